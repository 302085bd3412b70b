// The matrix products of a graph by bfloat16 operands, sums in float32. For *_cpu.cpp files only.
//
// What a product reads is rounded once, into a map with zeros around it, so that rows at its border have the taps of
// all others. Sixteen rows that lie at equal distances there are a tile as they are; others are put side by side first.
#pragma once

#include "ops/graph_chain/convolve.h"
#include "ops/graph_chain/convolved.h"

namespace mgebm::MGEBM_ISA {

constexpr int kPairRows = 32;    // two blocks of `tiles`
constexpr int kBfloatPairs = 4;  // of a piece of work: two strips' weights stay in L1 while they pass
constexpr int kBfloatRun = kBfloatPairs * kPairRows;

// pixel[i]: of the map that is read, what stands at pixel i of the rounded one; -1: zeros. Null: of the only pixel,
// what it is rounded to and what that leaves.
struct Frame {
  const int32_t* pixel;
  int count;
};

MG_INLINE int64_t rounded_bytes(const Frame& f, int inputs) { return 2LL * f.count * padded<Bf16>(inputs); }

MG_INLINE int most_taps(const Windows& w) {
  int most = 0;
  for (int c = 0; c < w.classes; ++c) {
    const int taps = taps_of(w, c).count;
    most = taps > most ? taps : most;
  }
  return most;
}

// The bytes of a run's operands: the number of each tap, then the rows' inputs of each.
MG_INLINE int64_t numbers_bytes(int taps) { return aligned(4LL * taps); }
MG_INLINE int64_t pair_bytes(int taps, int depth) { return 2LL * kPairRows * taps * depth; }
static inline int64_t run_bytes(const Windows& w, int inputs, int64_t samples) {
  const int taps = most_taps(w);
  const int64_t pairs = smaller(kBfloatPairs, (samples * w.outputs + kPairRows - 1) / kPairRows);
  return numbers_bytes(taps) + pairs * pair_bytes(taps, padded<Bf16>(inputs));
}

// Sixteen numbers, zeros after the first `count`.
MG_INLINE F16 load_some(const float* from, int count) {
  float some[16] = {};
  for (int c = 0; c < count; ++c) some[c] = from[c];
  return load(some);
}

// to[sample][pixel of the frame][depth], rounded; zeros where there is no channel.
template <typename Samples, typename In>
MG_INLINE void round_maps(const Samples& g, const Product<Bf16>& p, const Frame& f, const In& in, Bf16* to) {
  constexpr int kPiece = 32;
  const int depth = padded<Bf16>(p.inputs), whole = p.inputs / 16 * 16;
  if (!f.pixel) {
    return g.share((g.count + kPiece - 1) / kPiece, [&](int64_t i) {
      const int last = static_cast<int>(smaller(kPiece * (i + 1), g.count));
      for (int n = static_cast<int>(kPiece * i); n < last; ++n) {
        const float* const from = in(n);
        Bf16* const high = to + 2LL * n * depth;
        for (int k = 0; k < depth; k += 16) {
          const F16 v = k < whole ? load(from + k) : load_some(from + k, p.inputs - k);
          store_halves(high + k, high + depth + k, v);
        }
      }
    });
  }
  const int64_t all_pixels = static_cast<int64_t>(g.count) * f.count;
  g.share((all_pixels + kPiece - 1) / kPiece, [&](int64_t i) {
    const int64_t first = i * kPiece, last = smaller(first + kPiece, all_pixels);
    int sample = static_cast<int>(first / f.count), pixel = static_cast<int>(first % f.count);
    const float* map = in(sample);
    Bf16* out = to + first * depth;
    for (int64_t at = first; at < last; ++at, out += depth) {
      const int place = f.pixel[pixel];
      const float* from = map + static_cast<int64_t>(place) * p.depth;
      if (place < 0) {
        __builtin_memset(static_cast<void*>(out), 0, sizeof(Bf16) * depth);
      } else {
        for (int k = 0; k < whole; k += 16) store(out + k, load(from + k));
        for (int k = whole; k < depth; k += 16) store(out + k, load_some(from + k, p.inputs - k));
      }
      if (++pixel == f.count && at + 1 < last) map = in(++sample), pixel = 0;
    }
  });
}

// W * in as the sum of three products, with high what rounding gives and low what it leaves:
// high W high + high W low + low W high, to 2^-17 of each product. in: one pixel; its frame: high, low.
struct SplitProduct {
  static constexpr int kRows = 2, kTaps = 3;
  int32_t first_tap[2] = {0, kTaps}, tap_pixel[kTaps] = {0, 1, 0}, tap_weight[kTaps] = {0, 0, 1};
  int32_t first_output[2] = {0, 1}, zero[1] = {0};

  Windows windows() const { return {1, 1, first_tap, tap_pixel, tap_weight, first_output, zero, zero}; }
  Frame frame() const { return {nullptr, 2}; }
};
MG_INLINE int64_t split_numbers(const GraphStep& s) {
  return 16LL * strips_of(s.outputs) * SplitProduct::kRows * padded<Bf16>(s.inputs);
}
// [strip][channel][16] of float32 -> [strip][high, low][channel / 2][16][2].
static void split_weights(const GraphStep& s, Bf16* to) {
  const int depth = padded<Bf16>(s.inputs);
  for (int strip = 0; strip < strips_of(s.outputs); ++strip) {
    const float* const from = s.weights + 16LL * strip * s.inputs;
    Bf16* const high = to + 16LL * strip * SplitProduct::kRows * depth;
    const auto at = [&](int c) { return c < s.inputs ? load(from + 16 * c) : all(0.0f); };
    for (int c = 0; c < depth; c += 2) {
      const F16 a = at(c), b = at(c + 1);
      Bf16 rounded[2][16];
      store(rounded[0], a), store(rounded[1], b);
      store_pairs(high + 16 * c, a, b);
      store_pairs(high + 16 * (depth + c), a - load(rounded[0]), b - load(rounded[1]));
    }
  }
}

// to[tap][row][depth] <- what up to 16 rows read; zeros where there is no row.
static void gather_rows(const Bf16* const* rows, int count, int depth, const Taps& taps, Bf16* to) {
  for (int t = 0; t < taps.count; ++t) {
    const int64_t tap = static_cast<int64_t>(taps.pixel[t]) * depth;
    for (int r = 0; r < count; ++r, to += depth) {
      const Bf16* from = rows[r] + tap;
      for (int k = 0; k < depth; k += 32) __builtin_memcpy(to + k, from + k, 64);
    }
    __builtin_memset(static_cast<void*>(to), 0, sizeof(Bf16) * (16 - count) * depth);
    to += (16 - count) * depth;
  }
}

// Whether sixteen rows are there and lie `distance` apart.
MG_INLINE bool lie_apart(const Bf16* const* rows, int count, int64_t distance) {
  bool apart = count == 16;
  for (int r = 1; r < count; ++r) apart &= rows[r] - rows[0] == r * distance;
  return apart;
}

// Up to 32 rows as `tiles` takes them.
struct Pair {
  const Bf16* a[2];
  int rows[2], blocks;
  Rows lie;
  const int32_t* tap_pixel;

  // room: pair_bytes; numbers: 0 ... taps - 1.
  Pair(const Bf16* const* at, int count, const Taps& taps, int depth, const int32_t* numbers, Bf16* room)
      : a{at[0], at[count > 16 ? 16 : 0]},
        rows{count < 16 ? count : 16, count - 16},
        blocks(count > 16 ? 2 : 1),
        lie{depth, 1, count > 1 ? at[1] - at[0] : 0, depth},
        tap_pixel(taps.pixel) {
    bool apart = true;
    for (int i = 0; i < blocks; ++i) apart &= lie_apart(at + 16 * i, rows[i], lie.row);
    if (apart) return;
    lie = {16LL * depth, 1, depth, depth};
    tap_pixel = numbers;
    for (int i = 0; i < blocks; ++i, room += taps.count * lie.pixel) {
      gather_rows(at + 16 * i, rows[i], depth, taps, room);
      a[i] = room;
    }
  }
};

// W * in, as of float. rounded: of all threads, rounded_bytes a sample; own: this thread's, run_bytes.
template <typename Samples, typename In, typename Out>
static void each_product(const Samples& g, const Product<Bf16>& p, const Frame& f, char* rounded, char* own,
                         const In& in, const Out& out) {
  const Windows& w = p.windows;
  const int depth = padded<Bf16>(p.inputs);
  const int64_t strip_size = 16LL * p.rows * depth;
  Bf16* const maps = reinterpret_cast<Bf16*>(rounded);
  round_maps(g, p, f, in, maps);
  const auto map = [&](int sample) { return maps + static_cast<int64_t>(sample) * f.count * depth; };
  int32_t* const numbers = reinterpret_cast<int32_t*>(own);
  const int most = most_taps(w);
  for (int t = 0; t < most; ++t) numbers[t] = t;
  char* const room = own + numbers_bytes(most);
  using Rows = Run<kBfloatRun, Bf16>;
  each_run_of_strips(g, w, kBfloatRun, strips_of(p.outputs), [&](int c, int64_t start, int count, int strip, int last) {
    alignas(64) float tile[2][16 * kTileWidth];
    const Rows run(w, c, start, count, depth, map);
    const Takes<Rows, Out> take(run, count, out);
    const Taps taps = taps_of(w, c);
    alignas(Pair) unsigned char held[kBfloatPairs * sizeof(Pair)];
    Pair* const pairs = reinterpret_cast<Pair*>(held);
    for (int i = 0, r = 0; r < count; ++i, r += kPairRows) {
      Bf16* const own_room = reinterpret_cast<Bf16*>(room + i * pair_bytes(taps.count, depth));
      new (pairs + i) Pair(run.at + r, count - r < kPairRows ? count - r : kPairRows, taps, depth, numbers, own_room);
    }
    for (; strip < last; strip += kStrips) {
      const int wide = last - strip < kStrips ? last - strip : kStrips;
      const Bf16* const weights = p.weights + strip * strip_size;
      for (int i = 0, first = 0; first < count; ++i, first += kPairRows) {
        const Pair& q = pairs[i];
        tiles<false>(q.a, q.rows, q.blocks, q.lie, {q.tap_pixel, taps.weight, taps.count}, weights, strip_size, wide,
                     tile);
        for (int b = 0; b < q.blocks; ++b) {
          give_rows(out, &take[first + 16 * b], q.rows[b], strip, tile[b], wide);
        }
      }
    }
  });
}

// W * in + bias + second.
static void convolve(const Group& g, const GraphStep& s) {
  const int depth = g.buffer(s.in).depth;
  const Convolved out(g, s);
  const auto in = [&](int sample) { return g.at(s.in, sample); };
  if (s.split >= 0) {
    const SplitProduct split;
    const Windows windows = split.windows();
    const Product<Bf16> product{windows, g.split + s.split, SplitProduct::kRows, s.inputs, s.outputs, depth};
    return each_product(g, product, split.frame(), g.rounded, g.own, in, out);
  }
  if (s.bfloat_weights) {
    const Bf16* weights = static_cast<const Bf16*>(s.bfloat_weights);
    const Product<Bf16> product{s.windows, weights, s.rows, s.inputs, s.outputs, depth};
    return each_product(g, product, {s.place, s.placed}, g.rounded, g.own, in, out);
  }
  each_product(g, {s.windows, s.weights, s.rows, s.inputs, s.outputs, depth}, in, out);
}

}  // namespace mgebm::MGEBM_ISA
