// upsample: replication, out[d, h, w] = in[d / fd, h / fh, w / fw].
#pragma once

#include "mgebm/layout.h"

namespace mgebm {

struct UpsampleParams {
  const float* input;  // (planes, extent), contiguous
  float* output;       // (planes, extent * factor), contiguous
  int64_t planes;
  Extent extent;
  Extent factor;
  MGEBM_FIELDS(input, output, planes, extent, factor)
};

MG_HD int64_t upsample_source(const Extent& extent, const Extent& factor, int64_t d, int64_t h, int64_t w) {
  return (d / factor.depth * extent.height + h / factor.height) * extent.width + w / factor.width;
}

}  // namespace mgebm
