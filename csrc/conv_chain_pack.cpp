// Weights in the order in which conv_chain reads them; once a chain.
#include "ops/conv_chain.h"

namespace mgebm {
namespace {

// To nearest, ties to even; NaN stays one.
uint16_t bfloat_of(float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <typename T, int kPair, typename Convert>
void pack_typed(const ConvChainPack& p, int threads, Convert convert) {
  const int strips = (p.outputs + 15) / 16;
  T* to = static_cast<T*>(p.to);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int strip = 0; strip < strips; ++strip) {
    for (int channel = 0; channel < p.depth; ++channel) {
      // Taps innermost: they are neighbours where the weights come from.
      for (int lane = 0; lane < 16; ++lane) {
        const int output = 16 * strip + lane;
        const bool real = channel < p.inputs && output < p.outputs;
        const float* from = p.from + channel * p.input_stride + output * p.output_stride;
        T* at = to + static_cast<int64_t>(strip) * p.row_count * p.depth * 16 + channel / kPair * kPair * 16 +
                lane * kPair + channel % kPair;
        for (int row = 0; row < p.row_count; ++row) {
          at[static_cast<int64_t>(row) * p.depth * 16] = real ? convert(from[p.rows[row]]) : T{};
        }
      }
    }
  }
}

}  // namespace

void conv_chain_pack(const ConvChainPack& pack, int threads) {
  if (pack.bfloat) {
    pack_typed<uint16_t, 2>(pack, threads, bfloat_of);
  } else {
    pack_typed<float, 1>(pack, threads, [](float value) { return value; });
  }
}

}  // namespace mgebm
