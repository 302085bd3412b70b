// The matrix products of a graph by bfloat16 operands, sums in float32. For *_cpu.cpp files only.
//
// What a product reads is rounded once, into a map with zeros around it, so that rows at its border have the taps of
// all others. Sixteen rows that lie at equal distances there are a tile as they are; others are put side by side first.
#pragma once

#include "ops/graph_chain/convolve.h"

namespace mgebm::MGEBM_ISA {

constexpr int kPairRows = 32;    // two blocks of `tiles`
constexpr int kBfloatPairs = 4;  // of a piece of work: two strips' weights stay in L1 while they pass
constexpr int kBfloatRun = kBfloatPairs * kPairRows;

// pixel[i]: of the map that is read, what stands at pixel i of the rounded one; -1: zeros.
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

// to[sample][pixel of the frame][depth], rounded; zeros where there is no channel.
template <typename Samples, typename In>
MG_INLINE void round_maps(const Samples& g, const Product<Bf16>& p, const Frame& f, const In& in, Bf16* to) {
  constexpr int kPiece = 32;
  const int depth = padded<Bf16>(p.inputs), whole = p.inputs / 16 * 16, pieces = (f.count + kPiece - 1) / kPiece;
  g.share(static_cast<int64_t>(g.count) * pieces, [&](int64_t i) {
    const int sample = static_cast<int>(i / pieces), first = static_cast<int>(i % pieces) * kPiece;
    const float* const map = in(sample);
    Bf16* out = to + (static_cast<int64_t>(sample) * f.count + first) * depth;
    for (int pixel = first; pixel < first + kPiece && pixel < f.count; ++pixel, out += depth) {
      if (f.pixel[pixel] < 0) {
        __builtin_memset(static_cast<void*>(out), 0, sizeof(Bf16) * depth);
        continue;
      }
      const float* from = map + static_cast<int64_t>(f.pixel[pixel]) * p.depth;
      for (int k = 0; k < whole; k += 16) store(out + k, load(from + k));
      for (int k = whole; k < depth; k += 16) {
        float rest[16] = {};
        for (int c = 0; k + c < p.inputs; ++c) rest[c] = from[k + c];
        store(out + k, load(rest));
      }
    }
  });
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
          for (int r = 0; r < q.rows[b]; ++r) take[first + 16 * b + r](strip, tile[b] + r * kTileWidth, wide);
        }
      }
    }
  });
}

// W * in + bias + second.
static void convolve(const Group& g, const GraphStep& s) {
  const int in_depth = g.buffer(s.in).depth, out_depth = g.buffer(s.out).depth;
  const auto out = [&](int sample, int pixel) {
    const Finish finish(g, s, sample);
    const float* second = s.second < 0 ? nullptr : g.at(s.second, sample);
    return [=, &s](int strip, float* z, int strips) {
      const int64_t at = static_cast<int64_t>(pixel) * out_depth + 16 * strip;
      for (int i = 0; i < 16 * strips; i += 16) {
        if (s.bias) store(z + i, load(z + i) + load(s.bias + 16 * strip + i));
        if (second) store(z + i, load(z + i) + load(second + at + i));
      }
      finish(at, z, strips);
    };
  };
  const auto in = [&](int sample) { return g.at(s.in, sample); };
  if (s.bfloat_weights) {
    const Bf16* weights = static_cast<const Bf16*>(s.bfloat_weights);
    const Product<Bf16> product{s.windows, weights, s.rows, s.inputs, s.outputs, in_depth};
    return each_product(g, product, {s.place, s.placed}, g.rounded, g.own, in, out);
  }
  each_product(g, {s.windows, s.weights, s.rows, s.inputs, s.outputs, in_depth}, in, out);
}

}  // namespace mgebm::MGEBM_ISA
