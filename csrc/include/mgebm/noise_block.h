// A block of consecutive draws of one sample, as a loop the compiler vectorises. For *_cpu.cpp files only.
#pragma once

#include "ops/noise.h"

namespace mgebm {

constexpr int kBlockQuads = 256;
constexpr int kBlockElements = 4 * kBlockQuads;

// out[0 ... 4 * quads) <- the draws of quads first_quad ... first_quad + quads - 1.
template <Distribution distribution>
static inline __attribute__((always_inline)) void noise_quads(const SampleKey& key, uint32_t first_quad, int quads,
                                                              float* __restrict__ out) {
  const SampleKey k = key;
#pragma omp simd
  for (int i = 0; i < quads; ++i) {
    const Quad q = noise_quad(k, first_quad + static_cast<uint32_t>(i), distribution);
    out[4 * i + 0] = q.v0;
    out[4 * i + 1] = q.v1;
    out[4 * i + 2] = q.v2;
    out[4 * i + 3] = q.v3;
  }
  if (!k.valid) {
    for (int i = 0; i < 4 * quads; ++i) out[i] = __builtin_nanf("");
  }
}

}  // namespace mgebm
