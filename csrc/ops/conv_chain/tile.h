// The inner products of conv_chain: out[row][16 strip + lane] = sum over taps and channels of a * w, for one block of
// 16 rows and one or two strips. For *_cpu.cpp files only.
//
// Weights come in strips of 16 outputs, [tap row][channel][16], in bfloat16 [tap row][channel / 2][16][2]. A row's
// sum runs over taps, then channels, on its own accumulator: no tiling changes its value.
#pragma once

#include "mgebm/lanes.h"
#include "ops/conv_chain/conv_chain.h"

namespace mgebm::MGEBM_ISA {

constexpr int kStrips = 2;                // strips a tile
constexpr int kTileWidth = 16 * kStrips;  // floats a row of its result

struct Taps {
  const int32_t *pixel, *weight;
  int count;
};
// Those of a class of windows.
MG_INLINE Taps taps_of(const Windows& w, int c) {
  return {w.tap_pixel + w.first_tap[c], w.tap_weight + w.first_tap[c], w.first_tap[c + 1] - w.first_tap[c]};
}

// How inputs lie in memory, in elements.
struct Rows {
  int64_t pixel, channel, row;  // from one pixel, channel or row to the next
  int depth;                    // channels
};

// Sums start again from zero after this many channels at least, and the parts are added up: a rounding error then grows
// with the square root of a part's length and not of 6,400 products. All rows take a part before the next, so that its
// weights come from L2 once and then from L1.
constexpr int kPart = 128;

MG_INLINE int taps_of_part(int depth) { return kPart > depth ? (kPart + depth - 1) / depth : 1; }
MG_INLINE Taps part_of(const Taps& taps, int first, int step) {
  return {taps.pixel + first, taps.weight + first, taps.count - first < step ? taps.count - first : step};
}

// One part; kSamplesInner: rows are neighbours (the state); else a row's channels are.
template <int kRows, int kWide, bool kSamplesInner>
MG_INLINE void products(const float* a, const Rows& in, const Taps& part, const float* w, int64_t strip, bool first,
                        float* out) {
  const int64_t row_stride = kSamplesInner ? 1 : in.row;
  F16 sum[kRows][kWide];
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kWide; ++s) sum[r][s] = all(0.0f);
  }
  for (int t = 0; t < part.count; ++t) {
    const float* at = a + part.pixel[t] * in.pixel;
    const float* weight = w + static_cast<int64_t>(part.weight[t]) * in.depth * 16;
    for (int k = 0; k < in.depth; ++k, weight += 16) {
      F16 column[kWide];
      for (int s = 0; s < kWide; ++s) column[s] = load(weight + s * strip);
      const float* value = kSamplesInner ? at + k * in.channel : at + k;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const F16 broadcast = all(value[r * row_stride]);
#pragma GCC unroll 2
        for (int s = 0; s < kWide; ++s) sum[r][s] = multiply_add(broadcast, column[s], sum[r][s]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kWide; ++s) {
      float* at = out + r * kTileWidth + 16 * s;
      store(at, first ? sum[r][s] : load(at) + sum[r][s]);
    }
  }
}

#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 8, kWideAtOnce = 2;  // 16 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kRowsAtOnce = 6, kWideAtOnce = 1;  // 12 of 16, two a row
#else
constexpr int kRowsAtOnce = 2, kWideAtOnce = 1;
#endif

// The first `rows` rows: as many at once as there are registers for, then 4, 3, 2 and 1: of sixteen, 6 + 6 + 4.
template <int kRows, int kWide, bool kSamplesInner>
MG_INLINE void products_of_rows(const float* a, const Rows& in, const Taps& part, const float* w, int64_t strip,
                                int rows, bool first, float* out) {
  const int64_t row_stride = kSamplesInner ? 1 : in.row;
  for (; rows >= kRows; rows -= kRows, a += kRows * row_stride, out += kRows * kTileWidth) {
    products<kRows, kWide, kSamplesInner>(a, in, part, w, strip, first, out);
  }
  if constexpr (kRows > 1) {
    products_of_rows<(kRows > 4 ? 4 : kRows - 1), kWide, kSamplesInner>(a, in, part, w, strip, rows, first, out);
  }
}

// The tiles of `blocks` blocks a[i] of rows[i] samples, into out[i]; `strips` is 1 or 2.
template <bool kSamplesInner>
static void float_tiles(const float* const* a, const int* rows, int blocks, const Rows& in, const Taps& taps,
                        const float* w, int64_t strip, int strips, float (*out)[16 * kTileWidth]) {
  for (int i = 0; i < blocks; ++i) {
    if (rows[i] < 16 || taps.count == 0) __builtin_memset(out[i], 0, sizeof(out[i]));
  }
  const int step = taps_of_part(in.depth);
  for (int t = 0; t < taps.count; t += step) {
    const Taps part = part_of(taps, t, step);
    for (int i = 0; i < blocks; ++i) {
      if (strips == kWideAtOnce) {
        products_of_rows<kRowsAtOnce, kWideAtOnce, kSamplesInner>(a[i], in, part, w, strip, rows[i], t == 0, out[i]);
        continue;
      }
      for (int s = 0; s < strips; ++s) {
        products_of_rows<kRowsAtOnce, 1, kSamplesInner>(a[i], in, part, w + s * strip, strip, rows[i], t == 0,
                                                        out[i] + 16 * s);
      }
    }
  }
}

#if defined(__AVX512BF16__)

constexpr int kBfloatRows = 8;

template <int kWide>
MG_INLINE void bfloat_products(const Bf16* a, const Rows& in, const Taps& part, const Bf16* w, int64_t strip,
                               bool first, float* out) {
  __m512 sum[kBfloatRows][kWide];
  for (int r = 0; r < kBfloatRows; ++r) {
    for (int s = 0; s < kWide; ++s) sum[r][s] = _mm512_setzero_ps();
  }
  for (int t = 0; t < part.count; ++t) {
    const Bf16* at = a + part.pixel[t] * in.pixel;
    const Bf16* weight = w + static_cast<int64_t>(part.weight[t]) * in.depth * 16;
    for (int k = 0; k < in.depth; k += 2, weight += 32) {
      __m512bh column[kWide];
      for (int s = 0; s < kWide; ++s) column[s] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weight + s * strip));
#pragma GCC unroll 8
      for (int r = 0; r < kBfloatRows; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, at + r * in.row + k, sizeof pair);
        const __m512bh broadcast = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 2
        for (int s = 0; s < kWide; ++s) sum[r][s] = _mm512_dpbf16_ps(sum[r][s], broadcast, column[s]);
      }
    }
  }
  for (int r = 0; r < kBfloatRows; ++r) {
    for (int s = 0; s < kWide; ++s) {
      float* at = out + r * kTileWidth + 16 * s;
      _mm512_store_ps(at, first ? sum[r][s] : _mm512_add_ps(_mm512_load_ps(at), sum[r][s]));
    }
  }
}

#endif

#if defined(__AMX_BF16__)

// One sample block is the 16 rows of a tile register, 32 channels its width, and a strip's 32 x 16 weights another.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
MG_INLINE void begin_tiles() {
  const TileConfig config;
  _tile_loadconfig(&config);
}
MG_INLINE void end_tiles() { _tile_release(); }

// Two blocks and two strips: four accumulators hide the multiplier's latency.
MG_INLINE void tile_products_2x2(const Bf16* a0, const Bf16* a1, const Rows& in, const Taps& taps, const Bf16* w,
                                 int64_t strip, float* out0, float* out1) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int t = 0; t < taps.count; ++t) {
    const int64_t at = taps.pixel[t] * in.pixel;
    const Bf16* weight = w + static_cast<int64_t>(taps.weight[t]) * in.depth * 16;
    for (int k = 0; k < in.depth; k += 32, weight += 512) {
      _tile_loadd(4, a0 + at + k, in.row * 2);
      _tile_loadd(6, weight, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, weight + strip, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a1 + at + k, in.row * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out0, kTileWidth * 4);
  _tile_stored(1, out0 + 16, kTileWidth * 4);
  _tile_stored(2, out1, kTileWidth * 4);
  _tile_stored(3, out1 + 16, kTileWidth * 4);
}

MG_INLINE void tile_products_1x2(const Bf16* a, const Rows& in, const Taps& taps, const Bf16* w, int64_t strip,
                                 float* out) {
  _tile_zero(0);
  _tile_zero(1);
  for (int t = 0; t < taps.count; ++t) {
    const int64_t at = taps.pixel[t] * in.pixel;
    const Bf16* weight = w + static_cast<int64_t>(taps.weight[t]) * in.depth * 16;
    for (int k = 0; k < in.depth; k += 32, weight += 512) {
      _tile_loadd(4, a + at + k, in.row * 2);
      _tile_loadd(6, weight, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, weight + strip, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, out, kTileWidth * 4);
  _tile_stored(1, out + 16, kTileWidth * 4);
}

MG_INLINE void tile_products_2x1(const Bf16* a0, const Bf16* a1, const Rows& in, const Taps& taps, const Bf16* w,
                                 float* out0, float* out1) {
  _tile_zero(0);
  _tile_zero(2);
  for (int t = 0; t < taps.count; ++t) {
    const int64_t at = taps.pixel[t] * in.pixel;
    const Bf16* weight = w + static_cast<int64_t>(taps.weight[t]) * in.depth * 16;
    for (int k = 0; k < in.depth; k += 32, weight += 512) {
      _tile_loadd(6, weight, 64);
      _tile_loadd(4, a0 + at + k, in.row * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a1 + at + k, in.row * 2);
      _tile_dpbf16ps(2, 5, 6);
    }
  }
  _tile_stored(0, out0, kTileWidth * 4);
  _tile_stored(2, out1, kTileWidth * 4);
}

#else

MG_INLINE void begin_tiles() {}
MG_INLINE void end_tiles() {}

#endif

// The tiles of activations, in the chain's type. kState: of the state, which is float32 always.
template <bool kState>
static inline void tiles(const float* const* a, const int* rows, int blocks, const Rows& in, const Taps& taps,
                         const float* w, int64_t strip, int strips, float (*out)[16 * kTileWidth]) {
  float_tiles<kState>(a, rows, blocks, in, taps, w, strip, strips, out);
}

#if defined(__AVX512BF16__)
template <bool kState>
static inline void tiles(const Bf16* const* a, [[maybe_unused]] const int* rows, int blocks, const Rows& in,
                         const Taps& taps, const Bf16* w, int64_t strip, int strips, float (*out)[16 * kTileWidth]) {
#if defined(__AMX_BF16__)
  if (strips == 2 && blocks == 2) return tile_products_2x2(a[0], a[1], in, taps, w, strip, out[0], out[1]);
  if (strips == 2) return tile_products_1x2(a[0], in, taps, w, strip, out[0]);
  // One strip: with one block its products are computed twice and written to the same place.
  tile_products_2x1(a[0], a[blocks - 1], in, taps, w, out[0], out[blocks - 1]);
#else
  for (int i = 0; i < blocks; ++i) {
    // Samples that fill up the last block are computed with it, but not a half of a block that has none.
    if (rows[i] <= kBfloatRows || taps.count == 0) __builtin_memset(out[i], 0, sizeof(out[i]));
  }
  const int step = taps_of_part(in.depth);
  for (int t = 0; t < taps.count; t += step) {
    const Taps part = part_of(taps, t, step);
    for (int i = 0; i < blocks; ++i) {
      for (int r = 0; r < rows[i]; r += kBfloatRows) {
        const Bf16* at = a[i] + r * in.row;
        if (strips == 2) {
          bfloat_products<2>(at, in, part, w, strip, t == 0, out[i] + r * kTileWidth);
        } else {
          bfloat_products<1>(at, in, part, w, strip, t == 0, out[i] + r * kTileWidth);
        }
      }
    }
  }
#endif
}
#else
// The same sums in float32, for tests of what calls `tiles` on CPUs that do not multiply bfloat16.
template <bool kState>
static inline void tiles(const Bf16* const* a, const int* rows, int blocks, const Rows& in, const Taps& taps,
                         const Bf16* w, int64_t strip, int strips, float (*out)[16 * kTileWidth]) {
  const auto value = [](Bf16 v) { return as_float(static_cast<uint32_t>(v.bits) << 16); };
  for (int i = 0; i < blocks; ++i) {
    for (int row = 0; row < rows[i]; ++row) {
      for (int s = 0; s < strips; ++s) {
        float sum[16] = {};
        for (int t = 0; t < taps.count; ++t) {
          const Bf16* at = a[i] + row * in.row + taps.pixel[t] * in.pixel;
          const Bf16* weight = w + s * strip + static_cast<int64_t>(taps.weight[t]) * in.depth * 16;
          for (int k = 0; k < in.depth; k += 2, weight += 32) {
            const float first = value(at[k]), second = value(at[k + 1]);
#pragma omp simd
            for (int lane = 0; lane < 16; ++lane) {
              sum[lane] += first * value(weight[2 * lane]) + second * value(weight[2 * lane + 1]);
            }
          }
        }
        __builtin_memcpy(out[i] + row * kTileWidth + 16 * s, sum, sizeof sum);
      }
    }
  }
}
#endif

}  // namespace mgebm::MGEBM_ISA
