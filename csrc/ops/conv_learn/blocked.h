// Products of bfloat16 whose sixteen rows are samples, as in conv_chain: what the rows read then needs no copy a tap.
// For *_cpu.cpp files only.
#pragma once

#include "ops/conv_chain/sweep.h"
#include "ops/graph_chain/team.h"

namespace mgebm::MGEBM_ISA {

// A map as [block of 16 samples][pixel][sample][depth] in bfloat16; zeros fill up the last block and the depth.
// low: what rounding leaves of high.
struct Blocked {
  Bf16 *high, *low;
};

// [sample][pixel][depth] in float32 -> Blocked; low may be null.
static void to_blocks(const Team& team, const float* map, int64_t samples, int pixels, int depth, const Blocked& to) {
  const int wide = padded<Bf16>(depth);
  const int64_t blocks = (samples + 15) / 16;
  team.share(blocks * pixels, [&](int64_t i) {
    const int64_t first = i / pixels * 16;
    for (int n = 0; n < 16; ++n) {
      const float* from = map + ((first + n) * pixels + i % pixels) * depth;
      const int64_t at = (16 * i + n) * wide;
      for (int c = 0; c < wide; c += 16) {
        const F16 v = first + n < samples && c < depth ? load(from + c) : all(0.0f);
        store(to.high + at + c, v);
        if (to.low) store(to.low + at + c, v - load(to.high + at + c));
      }
    }
  });
}

// Weights [strip][tap row][channel / 2][16][2]; low: what rounding leaves of high, or null.
struct SplitWeights {
  const Bf16 *high, *low;
};

#if defined(__AMX_BF16__)

// The three products of one or two blocks and one or two strips; each tile is loaded once a tap and 32 channels.
template <int kBlocks, int kWide>
MG_INLINE void split_products(const Blocked* a, const Rows& in, const Taps& taps, const SplitWeights& w, int64_t strip,
                              float (*out)[16 * kTileWidth]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto load_rows = [&](Bf16* Blocked::* part, int64_t at) __attribute__((always_inline)) {
    _tile_loadd(4, a[0].*part + at, in.row * 2);
    if constexpr (kBlocks > 1) _tile_loadd(5, a[1].*part + at, in.row * 2);
  };
  const auto load_weights = [&](const Bf16* from) __attribute__((always_inline)) {
    _tile_loadd(6, from, 64);
    if constexpr (kWide > 1) _tile_loadd(7, from + strip, 64);
  };
  const auto multiply = [&]() __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBlocks > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kBlocks > 1 && kWide > 1) _tile_dpbf16ps(3, 5, 7);
  };
  for (int t = 0; t < taps.count; ++t) {
    const int64_t at = taps.pixel[t] * in.pixel, weight = static_cast<int64_t>(taps.weight[t]) * in.depth * 16;
    for (int k = 0; k < in.depth; k += 32) {
      load_rows(&Blocked::high, at + k);
      load_weights(w.low + weight + 16 * k);
      multiply();
      load_weights(w.high + weight + 16 * k);
      multiply();
      load_rows(&Blocked::low, at + k);
      multiply();
    }
  }
  _tile_stored(0, out[0], kTileWidth * 4);
  if constexpr (kWide > 1) _tile_stored(1, out[0] + 16, kTileWidth * 4);
  if constexpr (kBlocks > 1) _tile_stored(2, out[1], kTileWidth * 4);
  if constexpr (kBlocks > 1 && kWide > 1) _tile_stored(3, out[1] + 16, kTileWidth * 4);
}

MG_INLINE void split_tiles(const Blocked* a, const int*, int blocks, const Rows& in, const Taps& taps,
                           const SplitWeights& w, int64_t strip, int strips, float (*out)[16 * kTileWidth]) {
  if (blocks == 2) {
    strips == 2 ? split_products<2, 2>(a, in, taps, w, strip, out) : split_products<2, 1>(a, in, taps, w, strip, out);
  } else {
    strips == 2 ? split_products<1, 2>(a, in, taps, w, strip, out) : split_products<1, 1>(a, in, taps, w, strip, out);
  }
}

#else

static void split_tiles(const Blocked* a, const int* rows, int blocks, const Rows& in, const Taps& taps,
                        const SplitWeights& w, int64_t strip, int strips, float (*out)[16 * kTileWidth]) {
  const Bf16 *high[2], *low[2];
  for (int i = 0; i < blocks; ++i) high[i] = a[i].high, low[i] = a[i].low;
  tiles<false>(high, rows, blocks, in, taps, w.high, strip, strips, out);
  const auto add = [&](const Bf16* const* from, const Bf16* weights) {
    alignas(64) float more[2][16 * kTileWidth];
    tiles<false>(from, rows, blocks, in, taps, weights, strip, strips, more);
    for (int i = 0; i < blocks; ++i) {
      for (int n = 0; n < rows[i]; ++n) {
        for (int at = n * kTileWidth; at < n * kTileWidth + 16 * strips; at += 16) {
          store(out[i] + at, load(out[i] + at) + load(more[i] + at));
        }
      }
    }
  };
  add(high, w.low);
  add(low, w.high);
}

#endif

// A convolution of blocked maps of `pixels` pixels and `depth` channels, a multiple of 32.
struct BlockedProduct {
  const Windows& windows;
  Blocked in;
  SplitWeights weights;
  int pixels, depth, rows, strips;  // rows: of taps
};

// give(sample, output, first strip, numbers, strips) for all that a product makes. With weights.low the sum of three
// products, else that of what is rounded.
template <typename Samples, typename Give>
static void each_product(const Samples& e, const BlockedProduct& p, const Give& give) {
  const Rows in{16LL * p.depth, 1, p.depth, p.depth};
  const int64_t block_size = p.pixels * in.pixel, strip_size = 16LL * p.rows * p.depth;
  const int parts = p.weights.low ? 2 : 1;
  const int64_t item_bytes = parts * 2 * in.pixel * larger(1, p.pixels / larger(1, p.windows.outputs));
  sweep(e, p.windows, p.strips, item_bytes, parts * 2 * p.strips * strip_size,
        [&](const int* block, const int* output, const int* base, int count, const Taps& taps, int strip, int wide) {
          alignas(64) float out[2][16 * kTileWidth];
          Blocked a[2];
          const Bf16* high[2];
          int rows[2];
          for (int i = 0; i < count; ++i) {
            const int64_t at = block[i] * block_size + base[i] * in.pixel;
            rows[i] = e.valid(block[i]);
            high[i] = p.in.high + at;
            if (p.weights.low) a[i] = {p.in.high + at, p.in.low + at};
          }
          const Bf16* const weights = p.weights.high + strip * strip_size;
          if (p.weights.low) {
            const SplitWeights both{weights, p.weights.low + strip * strip_size};
            split_tiles(a, rows, count, in, taps, both, strip_size, wide, out);
          } else {
            tiles<false>(high, rows, count, in, taps, weights, strip_size, wide, out);
          }
          for (int i = 0; i < count; ++i) {
            for (int n = 0; n < rows[i]; ++n) {
              give(16LL * block[i] + n, output[i], strip, out[i] + n * kTileWidth, wide);
            }
          }
        });
}

}  // namespace mgebm::MGEBM_ISA
