// A block of consecutive draws of one sample: words first, then a loop that the compiler vectorises.
// For *_cpu.cpp files only.
#pragma once

#include "philox_block.h"

namespace mgebm::MGEBM_ISA {

constexpr int kBlockElements = 4 * kBlockQuads;

// out[0 ... 4 * quads) <- the draws of quads first_quad ... first_quad + quads - 1; quads <= kBlockQuads.
template <Distribution distribution>
static inline __attribute__((always_inline)) void noise_quads(const SampleKey& key, uint32_t first_quad, int quads,
                                                              float* __restrict__ out) {
  WordBlock block;
  philox_block(key, first_quad, quads, block);
#pragma omp simd
  for (int i = 0; i < quads; ++i) {
    const Quad q = noise_quad({block.w[0][i], block.w[1][i], block.w[2][i], block.w[3][i]}, distribution);
    out[4 * i + 0] = q.v0;
    out[4 * i + 1] = q.v1;
    out[4 * i + 2] = q.v2;
    out[4 * i + 3] = q.v3;
  }
  if (!key.valid) {
    for (int i = 0; i < 4 * quads; ++i) out[i] = __builtin_nanf("");
  }
}

}  // namespace mgebm::MGEBM_ISA
