// The matrix products of convolve.h with up to four outputs, as those that lead back to an image or up to an energy. Of
// sixteen lanes of outputs most would be padding: here the lanes are rows. For *_cpu.cpp files only.
#pragma once

#include "ops/conv_chain/tile.h"

namespace mgebm::MGEBM_ISA {

#if defined(__AVX2__)

constexpr int kLanes = 8;

// column[i] <- rows[0 ... 7][at + i], i = 0 ... 3
MG_INLINE void columns_of(const float* const* rows, int64_t at, __m256* column) {
  __m256 pair[4];
  for (int r = 0; r < 4; ++r) {
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(rows[r] + at));
    pair[r] = _mm256_insertf128_ps(low, _mm_loadu_ps(rows[r + 4] + at), 1);
  }
  const __m256 a = _mm256_unpacklo_ps(pair[0], pair[1]), b = _mm256_unpackhi_ps(pair[0], pair[1]);
  const __m256 c = _mm256_unpacklo_ps(pair[2], pair[3]), d = _mm256_unpackhi_ps(pair[2], pair[3]);
  column[0] = _mm256_shuffle_ps(a, c, 0x44), column[1] = _mm256_shuffle_ps(a, c, 0xEE);
  column[2] = _mm256_shuffle_ps(b, d, 0x44), column[3] = _mm256_shuffle_ps(b, d, 0xEE);
}

// One part of the sums of groups of eight rows; out[output][row]. A number's sum runs as in part_of_rows.
template <int kGroups, int kOutputs>
MG_INLINE void part_of_groups(const float* const* rows, int depth, int inputs, const Taps& part, const float* w,
                              bool first, float* out) {
  __m256 sum[kGroups][kOutputs];
  for (int g = 0; g < kGroups; ++g) {
    for (int o = 0; o < kOutputs; ++o) sum[g][o] = _mm256_setzero_ps();
  }
  for (int t = 0; t < part.count; ++t) {
    const int64_t tap = static_cast<int64_t>(part.pixel[t]) * depth;
    const float* weight = w + static_cast<int64_t>(part.weight[t]) * inputs * 16;
    const auto add = [&](int k, int count) {
      __m256 column[kGroups][4];
      for (int g = 0; g < kGroups; ++g) columns_of(rows + kLanes * g, tap + k, column[g]);
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) {
#pragma GCC unroll 4
        for (int o = 0; o < kOutputs; ++o) {
          const __m256 broadcast = _mm256_broadcast_ss(weight + 16 * (k + i) + o);
#pragma GCC unroll 2
          for (int g = 0; g < kGroups; ++g) sum[g][o] = _mm256_fmadd_ps(broadcast, column[g][i], sum[g][o]);
        }
      }
    };
    int k = 0;
    for (; k + 4 <= inputs; k += 4) add(k, 4);
    if (k < inputs) add(k, inputs - k);
  }
  for (int g = 0; g < kGroups; ++g) {
    for (int o = 0; o < kOutputs; ++o) {
      float* to = out + o * kGroups * kLanes + g * kLanes;
      _mm256_storeu_ps(to, first ? sum[g][o] : _mm256_add_ps(_mm256_loadu_ps(to), sum[g][o]));
    }
  }
}

#endif

}  // namespace mgebm::MGEBM_ISA
