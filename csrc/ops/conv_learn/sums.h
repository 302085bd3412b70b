// Sums of a batch's statistics. For *_cpu.cpp files only.
#pragma once

#include "mgebm/lanes.h"

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

}  // namespace mgebm::MGEBM_ISA
