// Gradients of weights by bfloat16 operands, the sums in float32. For *_cpu.cpp files only.
//
//   to[tap][c][o] = sum over output pixels p, then samples n, of h[p + tap][c][n] g[p][n][o]
//
// which is what `tiles` computes: its rows are 16 input channels, its taps pixels, its channels samples. Both maps are
// put in that order once, for all taps: at each pixel that is C + C' conversions a sample beside taps C C' products, by
// count of AMX instructions about as long as the products of 64 channels, an eighth of those of 512.
#pragma once

#include "ops/conv_learn/outer.h"

namespace mgebm::MGEBM_ISA {

#if defined(__AMX_BF16__)
constexpr int kSampleUnit = 32;  // the width of a tile
#else
constexpr int kSampleUnit = 16;
#endif
constexpr int64_t kPixelBytes = 512 << 10;  // of the pixels that are read for all weights before the next

MG_INLINE int64_t whole_samples(int64_t samples) { return (samples + kSampleUnit - 1) / kSampleUnit * kSampleUnit; }
// Half empty tiles gain nothing.
MG_INLINE bool fills_tiles(int64_t samples) { return 2 * samples >= whole_samples(samples); }

// h[pixel][channel][sample], g[strip][pixel][sample / 2][16][2]; zeros fill the samples up.
struct Turned {
  Bf16 *h, *g;
};

static void turn_inputs(const Team& team, const Outer& o, Bf16* to) {
  const int64_t samples = whole_samples(o.samples), sample_size = static_cast<int64_t>(o.in_pixels) * o.depth;
  team.share(sample_size / 16, [&](int64_t i) {
    const float* from = o.in + 16 * i;
    for (int64_t n = 0; n < samples; n += 16) {
      alignas(64) float rows[16][16], columns[16][16];
      for (int r = 0; r < 16; ++r) store(rows[r], n + r < o.samples ? load(from + (n + r) * sample_size) : all(0.0f));
      transpose(rows[0], 16, columns);
      for (int c = 0; c < 16; ++c) store(to + (16 * i + c) * samples + n, load(columns[c]));
    }
  });
}

static void turn_upstream(const Team& team, const Outer& o, Bf16* to) {
  const int64_t samples = whole_samples(o.samples), sample_size = static_cast<int64_t>(o.out_pixels) * o.strips * 16;
  team.share(sample_size / 16, [&](int64_t i) {
    const float* from = o.upstream + 16 * i;
    const auto row = [&](int64_t n) { return n < o.samples ? load(from + n * sample_size) : all(0.0f); };
    Bf16* at = to + (i % o.strips * o.out_pixels + i / o.strips) * samples * 16;
    for (int64_t n = 0; n < samples; n += 2, at += 32) store_pairs(at, row(n), row(n + 1));
  });
}

// Up to two blocks of 16 channels, each at a tap, by the pixels that they meet.
struct Blocks {
  const Bf16* at[2];
  float* to[2];
  int channels[2], count = 0;
};

static void flush(const Outer& o, const Rows& in, const Taps& pixels, const Bf16* g, int64_t strip_size, int wide,
                  Blocks& blocks) {
  if (blocks.count == 0) return;
  alignas(64) float tile[2][16 * kTileWidth];
  tiles<false>(blocks.at, blocks.channels, blocks.count, in, pixels, g, strip_size, wide, tile);
  for (int i = 0; i < blocks.count; ++i) {
    for (int c = 0; c < blocks.channels[i]; ++c) {
      for (int s = 0; s < wide; ++s) {
        float* to = blocks.to[i] + (c * o.strips + s) * 16;
        store(to, load(to) + load(tile[i] + c * kTileWidth + 16 * s));
      }
    }
  }
  blocks.count = 0;
}

// This thread's share of the blocks of channels; all threads turn the maps first.
static void bfloat_outer_sums(const Team& team, const Outer& o, const Turned& turned) {
  const int each = (o.inputs + 15) / 16;  // blocks a tap
  const int64_t samples = whole_samples(o.samples), all_blocks = static_cast<int64_t>(o.rows) * each;
  if (all_blocks == 0) return;  // nothing but padding is read
  turn_inputs(team, o, turned.h);
  turn_upstream(team, o, turned.g);
  const auto mine = [&](const auto& body) { each_column(team, all_blocks, o.strips, kStrips, body); };
  const auto channels_of = [&](int64_t block) { return static_cast<int>(smaller(16, o.inputs - block % each * 16)); };
  const auto lane_of = [&](int64_t block) { return block / each * o.inputs + block % each * 16; };
  mine([&](int strip, int wide, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) clear_sums(o, strip, wide, lane_of(b), lane_of(b) + channels_of(b));
  });
  const Windows& w = o.windows;
  const Rows in{o.depth * samples, 1, samples, static_cast<int>(samples)};
  const int64_t strip_size = o.out_pixels * samples * 16;
  const int64_t chunk = larger(1, kPixelBytes / (2 * samples * (o.depth + 16 * o.strips)));
  for (int c = 0; c < w.classes; ++c) {
    const Taps taps = taps_of(w, c);
    for (int64_t first_pixel = w.first_output[c]; first_pixel < w.first_output[c + 1]; first_pixel += chunk) {
      if (team.caller && team.interrupt.poll()) begin_tiles();
      if (team.interrupt.asked()) break;
      const int count = static_cast<int>(smaller(chunk, w.first_output[c + 1] - first_pixel));
      const Taps pixels{w.base + first_pixel, w.output + first_pixel, count};
      mine([&](int strip, int wide, int64_t first, int64_t last) {
        const Bf16* g = turned.g + strip * strip_size;
        Blocks blocks;
        for (int t = 0; t < taps.count; ++t) {
          const int64_t row = static_cast<int64_t>(taps.weight[t]) * each;
          for (int64_t b = larger(first, row); b < smaller(last, row + each); ++b) {
            blocks.at[blocks.count] = turned.h + taps.pixel[t] * in.pixel + (b - row) * 16 * samples;
            blocks.to[blocks.count] = o.to + (lane_of(b) * o.strips + strip) * 16;
            blocks.channels[blocks.count] = channels_of(b);
            if (++blocks.count == 2) flush(o, in, pixels, g, strip_size, wide, blocks);
          }
        }
        flush(o, in, pixels, g, strip_size, wide, blocks);
      });
    }
  }
  team.meet();
}

}  // namespace mgebm::MGEBM_ISA
