// pyramid: block means of planes at several sizes, each level from the sums of the one before, input read once.
#pragma once

#include "mgebm/layout.h"

namespace mgebm {

constexpr int kMaxLevels = 16;

struct PyramidLevel {
  Extent extent;  // divides that of the level before, the first that of the input
  float* output;  // (planes, extent) float32
  MGEBM_FIELDS(extent, output)
};

struct PyramidParams {
  const void* input;  // (planes, extent) uint8 or float32, contiguous
  bool input_is_bytes;
  int64_t planes;
  Extent extent;
  List<PyramidLevel, kMaxLevels> levels;
  MGEBM_FIELDS(input, input_is_bytes, planes, extent, levels)
};

// Sums are kept in int32 (bytes: exact up to 2^23 pixels a block) or double, so a mean is rounded once.
MG_HD float block_mean(int32_t sum, int64_t count) {
  return static_cast<float>(static_cast<double>(sum) / static_cast<double>(count));
}
MG_HD float block_mean(double sum, int64_t count) { return static_cast<float>(sum / static_cast<double>(count)); }

}  // namespace mgebm
