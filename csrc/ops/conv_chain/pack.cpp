// Weights in the order in which chains and the learning step read them; and what is asked of all numbers of a net:
// whether they are finite, and whether they are those of before.
#include <cstring>

#include "ops/conv_chain/conv_chain.h"

namespace mgebm {
namespace {

float high_of(float weight) { return as_float(static_cast<uint32_t>(bfloat_of(weight)) << 16); }

// By all threads of a team. kRun: lanes of one output, each with a row of its own.
template <typename T, int kPair, int kRun>
void pack_typed(const ConvChainPack& p) {
  constexpr int kOutputs = 16 / kRun;
  const int strips = (p.outputs + kOutputs - 1) / kOutputs, groups = p.depth / kPair;
#pragma omp for collapse(2) schedule(static) nowait
  for (int strip = 0; strip < strips; ++strip) {
    for (int group = 0; group < groups; ++group) {
      const int channel = group * kPair, left = p.outputs - kOutputs * strip;
      const int lanes = kRun * (left < kOutputs ? left : kOutputs);
      const int channels = p.inputs - channel < kPair ? p.inputs - channel : kPair;
      const float* from = p.from + channel * p.input_stride + kOutputs * strip * p.output_stride;
      T* at = static_cast<T*>(p.to) + (static_cast<int64_t>(strip) * p.row_count * p.depth + channel) * 16;
      float found[kPair][16] = {};
      for (int row = 0; row < p.row_count; ++row, at += static_cast<int64_t>(p.depth) * 16) {
        const int64_t* taps = p.rows + row * kRun;
        for (int c = 0; c < channels; ++c) {
          for (int lane = 0; lane < lanes; ++lane) {
            const int64_t tap = taps[lane % kRun];
            const float* weight = from + tap + lane / kRun * p.output_stride + c * p.input_stride;
            found[c][lane] = kRun > 1 && tap < 0 ? 0.0f : *weight;
          }
        }
        if constexpr (kPair == 1) {
          for (int lane = 0; lane < 16; ++lane) at[lane] = found[0][lane];
        } else {
          for (int c = 0; p.rest && c < kPair; ++c) {
            for (int lane = 0; lane < 16; ++lane) found[c][lane] -= high_of(found[c][lane]);
          }
          uint32_t words[16];  // the first channel of a pair is the lower half
          for (int lane = 0; lane < 16; ++lane) {
            words[lane] = bfloat_of(found[0][lane]) | static_cast<uint32_t>(bfloat_of(found[1][lane])) << 16;
          }
          std::memcpy(at, words, sizeof words);
        }
      }
    }
  }
}

template <typename T, int kPair>
void pack_runs(const ConvChainPack& p) {
  p.run == 1             ? pack_typed<T, kPair, 1>(p)
  : p.run == kEdgePixels ? pack_typed<T, kPair, kEdgePixels>(p)
                         : pack_typed<T, kPair, 16>(p);
}

}  // namespace

void conv_chain_pack(const ConvChainPacks& packs, int threads) {
#pragma omp parallel num_threads(threads)
  for (int i = 0; i < packs.jobs.count; ++i) {
    const ConvChainPack& job = packs.jobs.at[i];
    job.bfloat ? pack_runs<uint16_t, 2>(job) : pack_runs<float, 1>(job);
  }
}

bool all_finite(const float* numbers, int64_t count) {
  uint32_t found = 0;  // the carry out of an exponent of ones
  for (int64_t i = 0; i < count; ++i) found |= (as_bits(numbers[i]) & 0x7F800000) + 0x00800000;
  return found >> 31 == 0;
}

bool all_same(const void* one, const void* other, int64_t bytes) {
  return bytes == 0 || std::memcmp(one, other, static_cast<size_t>(bytes)) == 0;
}

}  // namespace mgebm
