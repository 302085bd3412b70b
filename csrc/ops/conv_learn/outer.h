// Gradients of weights: sums of outer products over (sample, pixel) pairs. For *_cpu.cpp files only.
//
// A lane is one tap of one input channel. Sixteen outputs of some lanes are summed in registers over the rows of a
// chunk; chunks are added up in order, so that no tiling and no share of a thread changes a bit.
#pragma once

#include "ops/conv_learn/conv_learn.h"
#include "ops/graph_chain/convolve.h"

namespace mgebm::MGEBM_ISA {

constexpr int kChunkRows = 128;

// Lanes with what they read, from where a row begins to read, and where their sums are kept.
struct LaneTile {
  int count = 0;
  int64_t from[kRowsAtOnce];
  float* to[kRowsAtOnce];
};

// to[j][16 s + i] += sum over r of rows[r][from[j]] g[r][16 s + i], for the first lanes of a tile
template <int kLanes, int kWide>
MG_INLINE void outer_products(const float* const* rows, int count, const int64_t* from, const float* g,
                              float* const* to) {
  F16 sum[kLanes][kWide];
  for (int j = 0; j < kLanes; ++j) {
    for (int s = 0; s < kWide; ++s) sum[j][s] = all(0.0f);
  }
  for (int r = 0; r < count; ++r, g += 16 * kWide) {
    const float* row = rows[r];
    F16 column[kWide];
    for (int s = 0; s < kWide; ++s) column[s] = load(g + 16 * s);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      const F16 broadcast = all(row[from[j]]);
#pragma GCC unroll 2
      for (int s = 0; s < kWide; ++s) sum[j][s] = multiply_add(broadcast, column[s], sum[j][s]);
    }
  }
  for (int j = 0; j < kLanes; ++j) {
    for (int s = 0; s < kWide; ++s) store(to[j] + 16 * s, load(to[j] + 16 * s) + sum[j][s]);
  }
}

template <int kLanes, int kWide>
MG_INLINE void outer_products_of(const float* const* rows, int count, const LaneTile& tile, int first, const float* g) {
  int left = tile.count - first;
  for (; left >= kLanes; left -= kLanes, first += kLanes) {
    outer_products<kLanes, kWide>(rows, count, tile.from + first, g, tile.to + first);
  }
  if constexpr (kLanes > 1) {
    outer_products_of<(kLanes > 4 ? 4 : kLanes - 1), kWide>(rows, count, tile, first, g);
  }
}

template <int kWide>
static void flush(const float* const* rows, int count, const float* g, LaneTile& tile) {
  outer_products_of<kRowsAtOnce, kWide>(rows, count, tile, 0, g);
  tile.count = 0;
}

// What a weight's gradient is made of: maps of `depth` floats a pixel, `inputs` of them channels, and the upstream.
struct Outer {
  const Windows& windows;
  const float *in, *upstream;
  int in_pixels, depth, inputs, rows;  // rows of taps
  int out_pixels, strips;
  int64_t samples;
  float* to;  // (rows, inputs, strips 16)
};

// Lanes first ... last - 1 of some strips, for the rows of one chunk.
template <int kWide>
static void outer_strips(const Outer& o, const Taps& taps, const float* const* rows, const float* const* upstream,
                         int count, int strip, int64_t first, int64_t last) {
  alignas(64) float g[kChunkRows * 16 * kWide];
  for (int r = 0; r < count; ++r) {
    for (int s = 0; s < kWide; ++s) store(g + (r * kWide + s) * 16, load(upstream[r] + 16 * (strip + s)));
  }
  LaneTile tile;
  for (int t = 0; t < taps.count; ++t) {
    const int64_t lane = static_cast<int64_t>(taps.weight[t]) * o.inputs;
    const int64_t begin = larger(0, first - lane), end = smaller(o.inputs, last - lane);
    for (int64_t c = begin; c < end; ++c) {
      tile.from[tile.count] = static_cast<int64_t>(taps.pixel[t]) * o.depth + c;
      tile.to[tile.count++] = o.to + ((lane + c) * o.strips + strip) * 16;
      if (tile.count == kRowsAtOnce) flush<kWide>(rows, count, g, tile);
    }
  }
  flush<kWide>(rows, count, g, tile);
}

// This thread's share of `pieces` pieces of each column of `wide` strips: body(strip, strips, first piece, last).
template <typename Body>
MG_INLINE void each_column(const Team& team, int64_t pieces, int strips, int wide, const Body& body) {
  const int columns = (strips + wide - 1) / wide;
  const int64_t begin = columns * pieces * team.thread / team.threads;
  const int64_t end = columns * pieces * (team.thread + 1) / team.threads;
  for (int column = static_cast<int>(begin / pieces); column < columns && column * pieces < end; ++column) {
    const int strip = column * wide;
    body(strip, strips - strip < wide ? strips - strip : wide, larger(0, begin - column * pieces),
         smaller(pieces, end - column * pieces));
  }
}

static void clear_sums(const Outer& o, int strip, int wide, int64_t first, int64_t last) {
  for (int64_t lane = first; lane < last; ++lane) {
    for (int s = 0; s < wide; ++s) store(o.to + (lane * o.strips + strip + s) * 16, all(0.0f));
  }
}

// The sums of all rows, this thread's share of the lanes.
static void outer_sums(const Team& team, const Outer& o) {
  const int64_t lanes = static_cast<int64_t>(o.rows) * o.inputs;
  if (lanes == 0) return;  // nothing but padding is read
  // Whole tiles of lanes of each column of strips.
  const int64_t tiles = (lanes + kRowsAtOnce - 1) / kRowsAtOnce;
  const auto mine = [&](const auto& body) {
    each_column(team, tiles, o.strips, kWideAtOnce, [&](int strip, int wide, int64_t first, int64_t last) {
      body(strip, wide, first * kRowsAtOnce, smaller(last * kRowsAtOnce, lanes));
    });
  };
  mine([&](int strip, int wide, int64_t first, int64_t last) { clear_sums(o, strip, wide, first, last); });
  const Windows& w = o.windows;
  for (int c = 0; c < w.classes; ++c) {
    const int first_output = w.first_output[c], outputs = w.first_output[c + 1] - first_output;
    const Taps taps = taps_of(w, c);
    const int64_t all_rows = outputs * o.samples;
    for (int64_t start = 0; start < all_rows && taps.count; start += kChunkRows) {
      if (team.caller) team.interrupt.poll();
      if (team.interrupt.asked()) break;
      const int count = static_cast<int>(smaller(kChunkRows, all_rows - start));
      const float *rows[kChunkRows], *upstream[kChunkRows];
      for (int r = 0; r < count; ++r) {
        const int64_t sample = (start + r) / outputs;
        const int output = first_output + static_cast<int>((start + r) % outputs);
        rows[r] = o.in + (sample * o.in_pixels + w.base[output]) * o.depth;
        upstream[r] = o.upstream + (sample * o.out_pixels + w.output[output]) * o.strips * 16;
      }
      mine([&](int strip, int wide, int64_t first, int64_t last) {
        if (wide == kWideAtOnce) {
          outer_strips<kWideAtOnce>(o, taps, rows, upstream, count, strip, first, last);
        } else {
          outer_strips<1>(o, taps, rows, upstream, count, strip, first, last);
        }
      });
    }
  }
  team.meet();
}

// The sums as the weight lies in memory, (outputs, inputs, taps); 0 for a tap that always lies outside the map.
static void give_sums(const Team& team, const Outer& o, const LearnStage& to, int outputs) {
  const int64_t row_size = static_cast<int64_t>(o.inputs) * o.strips * 16, output_size = 1LL * o.inputs * to.taps;
  team.share(static_cast<int64_t>(o.strips) * o.inputs, [&](int64_t i) {
    const int strip = static_cast<int>(i / o.inputs), c = static_cast<int>(i % o.inputs);
    const int lanes = outputs - 16 * strip < 16 ? outputs - 16 * strip : 16;
    const float* const from = o.to + (static_cast<int64_t>(c) * o.strips + strip) * 16;
    float* const weight = to.weight + 16 * strip * output_size + static_cast<int64_t>(c) * to.taps;
    if (o.rows < to.taps) {
      for (int lane = 0; lane < lanes; ++lane) {
        __builtin_memset(weight + lane * output_size, 0, sizeof(float) * to.taps);
      }
    }
    for (int row = 0; row < o.rows; row += 16) {
      const int rows = o.rows - row < 16 ? o.rows - row : 16;
      alignas(64) float in[16][16], out[16][16];
      for (int r = 0; r < 16; ++r) store(in[r], r < rows ? load(from + (row + r) * row_size) : all(0.0f));
      transpose(in[0], 16, out);
      for (int lane = 0; lane < lanes; ++lane) {
        float* const at = weight + lane * output_size;
        for (int r = 0; r < rows; ++r) at[to.rows[row + r]] = out[lane][r];
      }
    }
  });
}

}  // namespace mgebm::MGEBM_ISA
