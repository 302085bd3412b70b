// noise: out[n, e] from Philox words of (seed, sample id n, step, stream, e); normals, uniforms or the words
// themselves.
#pragma once

#include "mgebm/counters.h"

namespace mgebm {

struct NoiseParams {
  void* out;  // (samples, elements) float32, or int64 for kBits, contiguous
  int64_t samples;
  int64_t elements;
  uint32_t first_quad;  // 0: the whole sample; else a part of it that starts at element 4 * first_quad
  Distribution distribution;
  Counters counters;
  MGEBM_FIELDS(out, samples, elements, first_quad, distribution, counters)
};

}  // namespace mgebm
