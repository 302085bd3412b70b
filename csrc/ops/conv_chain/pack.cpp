// Weights in the order in which conv_chain reads them; once a chain.
#include "ops/conv_chain/conv_chain.h"

namespace mgebm {
namespace {

inline void convert(float from, float& to) { to = from; }
inline void convert(float from, uint16_t& to) { to = bfloat_of(from); }

template <typename T, int kPair>
void pack_typed(const ConvChainPack& p, int threads) {
  const int strips = (p.outputs + 15) / 16, groups = p.depth / kPair;
  T* to = static_cast<T*>(p.to);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int strip = 0; strip < strips; ++strip) {
    for (int group = 0; group < groups; ++group) {
      const int channel = group * kPair, left = p.outputs - 16 * strip;
      const int lanes = left < 16 ? left : 16, channels = p.inputs - channel < kPair ? p.inputs - channel : kPair;
      const float* from = p.from + channel * p.input_stride + 16 * strip * p.output_stride;
      T* at = to + (static_cast<int64_t>(strip) * p.row_count * p.depth + channel) * 16;
      for (int row = 0; row < p.row_count; ++row, at += static_cast<int64_t>(p.depth) * 16) {
        const float* tap = from + p.rows[row];
        if (lanes < 16 || channels < kPair) {
          for (int i = 0; i < 16 * kPair; ++i) at[i] = T{};
        }
        for (int c = 0; c < channels; ++c) {
#pragma omp simd
          for (int lane = 0; lane < lanes; ++lane) {
            float weight = tap[lane * p.output_stride + c * p.input_stride];
            if (p.rest) weight -= as_float(static_cast<uint32_t>(bfloat_of(weight)) << 16);
            convert(weight, at[lane * kPair + c]);
          }
        }
      }
    }
  }
}

}  // namespace

void conv_chain_pack(const ConvChainPack& pack, int threads) {
  if (pack.bfloat) {
    pack_typed<uint16_t, 2>(pack, threads);
  } else {
    pack_typed<float, 1>(pack, threads);
  }
}

}  // namespace mgebm
