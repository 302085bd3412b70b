// A unit of work is one input row: its widened copy is written once and then repeated for the block's other rows.
#include <cstring>

#include "mgebm/cpu.h"
#include "ops/upsample.h"

namespace mgebm::MGEBM_ISA {
namespace {

template <int kFactor>
void widen(const float* __restrict__ row, float* __restrict__ out, int64_t width, int64_t factor) {
  const int64_t f = kFactor ? kFactor : factor;
  for (int64_t w = 0; w < width; ++w) {
    for (int64_t j = 0; j < f; ++j) out[w * f + j] = row[w];
  }
}

void widen_row(const float* row, float* out, int64_t width, int64_t factor) {
  switch (factor) {
    case 2:
      return widen<2>(row, out, width, factor);
    case 3:
      return widen<3>(row, out, width, factor);
    case 4:
      return widen<4>(row, out, width, factor);
    default:
      return widen<0>(row, out, width, factor);
  }
}

}  // namespace

void upsample_cpu(const UpsampleParams& p, int threads) {
  const Extent in = p.extent, f = p.factor;
  const int64_t rows = in.depth * in.height, out_width = in.width * f.width, out_height = in.height * f.height;
  const int64_t out_volume = in.depth * f.depth * out_height * out_width;
  threads = threads_for(p.planes * out_volume, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t unit = 0; unit < p.planes * rows; ++unit) {
    const int64_t plane = unit / rows, d = unit % rows / in.height, h = unit % in.height;
    float* const out = p.output + plane * out_volume + d * f.depth * out_height * out_width;
    float* const first = out + h * f.height * out_width;
    widen_row(p.input + unit * in.width, first, in.width, f.width);
    for (int64_t i = 0; i < f.depth; ++i) {
      for (int64_t j = 0; j < f.height; ++j) {
        float* const row = out + (i * out_height + h * f.height + j) * out_width;
        if (row != first) std::memcpy(row, first, sizeof(float) * static_cast<size_t>(out_width));
      }
    }
  }
}

}  // namespace mgebm::MGEBM_ISA
