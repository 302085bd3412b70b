// Sums of a batch's statistics, and of what shows whether weights are finite. For *_cpu.cpp files only.
#pragma once

#include "ops/conv_chain/engine.h"
#include "ops/conv_learn/conv_learn.h"

namespace mgebm::MGEBM_ISA {

// Sixteen sums over i < count of body(i), in double: a batch's statistics cancel most of what is summed.
struct Sums {
  double at[16];
};
template <typename Body>
MG_INLINE Sums sum_of(int64_t count, const Body& body) {
  Sums sums{};
  for (int64_t i = 0; i < count; ++i) {
    alignas(64) float v[16];
    store(v, body(i));
#pragma omp simd
    for (int lane = 0; lane < 16; ++lane) sums.at[lane] += v[lane];
  }
  return sums;
}

// 0, or NaN where a weight of the stage is not finite.
static inline float nothing_of(const LearnStage& learn) {
  const ConvStage& s = learn.conv;
  F16 sum = all(0.0f);
  const auto add = [&](const auto* w, int inputs) {
    const int64_t size = 16LL * s.forward_rows * inputs * strips_of(s.out_channels);
    for (int64_t i = 0; i < size; i += 16) sum = multiply_add(load(w + i), all(0.0f), sum);
  };
  learn.rest ? add(static_cast<const Bf16*>(s.forward_weights), padded<Bf16>(s.in_channels))
             : add(static_cast<const float*>(s.forward_weights), s.in_channels);
  for (int i = 0; i < 16 * strips_of(s.out_channels); i += 16) {
    sum = multiply_add(load(s.bias + i), all(0.0f), sum);
    if (s.gamma) sum = sum + (load(s.gamma + i) + load(s.beta + i)) * all(0.0f);
  }
  alignas(64) float lanes[16];
  store(lanes, sum);
  float nothing = 0.0f;
  for (int i = 0; i < 16; ++i) nothing += lanes[i];
  return nothing;
}

}  // namespace mgebm::MGEBM_ISA
