// noise: out[n, e] from Philox words of (seed, sample id n, step, stream, e); normals, uniforms or the words
// themselves.
#pragma once

#include "mgebm/counters.h"

namespace mgebm {

enum class Distribution : int { kNormal = 0, kUniform = 1, kBits = 2 };

struct NoiseParams {
  void* out;  // (samples, elements) float32, or int64 for kBits, contiguous
  int64_t samples;
  int64_t elements;
  uint32_t first_quad;  // 0: the whole sample; else a part of it that starts at element 4 * first_quad
  Distribution distribution;
  Counters counters;
};

MG_HD Quad noise_quad(Words words, Distribution distribution) {
  return distribution == Distribution::kNormal ? normals_of(words) : uniforms_of(words);
}

// Returns the CUDA error code, 0 on success.
int noise_cuda(const NoiseParams& params, int device, void* stream);

}  // namespace mgebm
