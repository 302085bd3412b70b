// pyramid: block means of planes at several sizes, each level from the sums of the one before, input read once.
#pragma once

#include "mgebm/macros.h"

namespace mgebm {

constexpr int kMaxLevels = 16;

// Up to three spatial dimensions, (depth, height, width); missing ones are 1.
struct Extent {
  int64_t depth, height, width;
};

MG_HD int64_t volume(const Extent& e) { return e.depth * e.height * e.width; }

struct PyramidParams {
  const void* input;  // (planes, extent) uint8 or float32, contiguous
  bool input_is_bytes;
  int64_t planes;
  Extent extent;
  int levels;
  Extent level_extent[kMaxLevels];  // each divides the one before, the first divides `extent`
  float* level_output[kMaxLevels];  // (planes, level_extent) float32
};

// Sums are kept in int32 (bytes: exact up to 2^23 pixels a block) or double, so a mean is rounded once.
MG_HD float block_mean(int32_t sum, int64_t count) {
  return static_cast<float>(static_cast<double>(sum) / static_cast<double>(count));
}
MG_HD float block_mean(double sum, int64_t count) { return static_cast<float>(sum / static_cast<double>(count)); }

int pyramid_cuda(const PyramidParams& params, int device, void* stream);

}  // namespace mgebm
