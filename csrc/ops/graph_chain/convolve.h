// The matrix products of a graph: rows are (sample, pixel) pairs, each with its own address. For *_cpu.cpp files only.
//
// Weights lie in strips of 16 outputs, [strip][tap row][channel][16]. A row's sum runs over taps, then channels, on its
// own accumulator, and starts again every kPart channels: no tiling changes its value.
#pragma once

#include <new>
#include <utility>

#include "ops/conv_chain/engine.h"
#include "ops/graph_chain/few.h"
#include "ops/graph_chain/team.h"

namespace mgebm::MGEBM_ISA {

constexpr int kRunRows = 4 * kRowsAtOnce;  // of a piece of work: they stay in L1 while a part's weights pass
constexpr int kFewRows = 32;               // of one with few outputs
constexpr int kMostRows = kRunRows > kFewRows ? kRunRows : kFewRows;

// One part of the sums of kRows rows and kWide strips; row r reads at rows[r].
template <int kRows, int kWide>
MG_INLINE void part_of_rows(const float* const* rows, int depth, int inputs, const Taps& part, const float* w,
                            int64_t strip, bool first, float* out) {
  F16 sum[kRows][kWide];
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kWide; ++s) sum[r][s] = all(0.0f);
  }
  for (int t = 0; t < part.count; ++t) {
    const int64_t tap = static_cast<int64_t>(part.pixel[t]) * depth;
    const float* weight = w + static_cast<int64_t>(part.weight[t]) * inputs * 16;
    const float* at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = rows[r] + tap;
    for (int k = 0; k < inputs; ++k, weight += 16) {
      F16 column[kWide];
      for (int s = 0; s < kWide; ++s) column[s] = load(weight + s * strip);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const F16 broadcast = all(at[r][k]);
#pragma GCC unroll 2
        for (int s = 0; s < kWide; ++s) sum[r][s] = multiply_add(broadcast, column[s], sum[r][s]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kWide; ++s) {
      float* to = out + r * kTileWidth + 16 * s;
      store(to, first ? sum[r][s] : load(to) + sum[r][s]);
    }
  }
}

template <int kRows, int kWide>
MG_INLINE void part_of_run(const float* const* rows, int count, int depth, int inputs, const Taps& part, const float* w,
                           int64_t strip, bool first, float* out) {
  for (; count >= kRows; count -= kRows, rows += kRows, out += kRows * kTileWidth) {
    part_of_rows<kRows, kWide>(rows, depth, inputs, part, w, strip, first, out);
  }
  if constexpr (kRows > 1) {
    part_of_run<(kRows > 4 ? 4 : kRows - 1), kWide>(rows, count, depth, inputs, part, w, strip, first, out);
  }
}

// part(rows, inputs, taps, weights, whether the first) for every part of a run's sums, in order.
template <typename Part>
MG_INLINE void each_part(const float* const* rows, int count, int depth, int inputs, const Taps& taps, const float* w,
                         const Part& part) {
  // A dense layer of many inputs is one tap of them: it is cut as well.
  if (inputs > kPart) {
    for (int t = 0; t < taps.count; ++t) {
      const int32_t none = 0;
      for (int k = 0; k < inputs; k += kPart) {
        const float* at[kRunRows];
        for (int r = 0; r < count; ++r) at[r] = rows[r] + static_cast<int64_t>(taps.pixel[t]) * depth + k;
        const float* weight = w + (static_cast<int64_t>(taps.weight[t]) * inputs + k) * 16;
        const int here = inputs - k < kPart ? inputs - k : kPart;
        part(at, here, Taps{&none, &none, 1}, weight, t == 0 && k == 0);
      }
    }
    return;
  }
  const int step = taps_of_part(inputs);
  for (int t = 0; t < taps.count; t += step) part(rows, inputs, part_of(taps, t, step), w, t == 0);
}

// Never part of its callers: their code took the registers that the sums need, a third of the speed.
template <int kWide>
static __attribute__((noinline)) void products_of_run(const float* const* rows, int count, int depth, int inputs,
                                                      const Taps& taps, const float* w, int64_t strip, float* out) {
  if (taps.count == 0) __builtin_memset(out, 0, sizeof(float) * count * kTileWidth);
  each_part(rows, count, depth, inputs, taps, w,
            [&](const float* const* at, int here, const Taps& part, const float* weight, bool first)
                __attribute__((always_inline)) {
                  part_of_run<kRowsAtOnce, kWide>(at, count, depth, here, part, weight, strip, first, out);
                });
}

#if defined(__AVX2__)

template <int kGroups, int kOutputs>
MG_INLINE void few_products_of_groups(const float* const* rows, int count, int depth, int inputs, const Taps& taps,
                                      const float* w, float* out) {
  constexpr int kRows = kGroups * kLanes;
  alignas(64) float sums[kOutputs * kRows] = {};
  const float* all[kRows];
  for (int r = 0; r < kRows; ++r) all[r] = rows[r < count ? r : 0];
  each_part(all, kRows, depth, inputs, taps, w,
            [&](const float* const* at, int here, const Taps& part, const float* weight, bool first) __attribute__((
                always_inline)) { part_of_groups<kGroups, kOutputs>(at, depth, here, part, weight, first, sums); });
  for (int r = 0; r < count && r < kRows; ++r, out += kTileWidth) {
    for (int o = 0; o < 16; ++o) out[o] = o < kOutputs ? sums[o * kRows + r] : 0.0f;
  }
}

// The same numbers as products_of_run's first strip, of so few outputs.
template <int kOutputs>
static __attribute__((noinline)) void few_products_of_run(const float* const* rows, int count, int depth, int inputs,
                                                          const Taps& taps, const float* w, float* out) {
  for (; count > kLanes; count -= 2 * kLanes, rows += 2 * kLanes, out += 2 * kLanes * kTileWidth) {
    few_products_of_groups<2, kOutputs>(rows, count, depth, inputs, taps, w, out);
  }
  if (count > 0) few_products_of_groups<1, kOutputs>(rows, count, depth, inputs, taps, w, out);
}

#endif

using FewProducts = void (*)(const float* const*, int, int, int, const Taps&, const float*, float*);

// Those for so many outputs; null where rows of outputs are as fast, or four inputs at once could lie outside a map.
MG_INLINE FewProducts few_products([[maybe_unused]] int outputs, [[maybe_unused]] int depth) {
#if defined(__AVX2__)
  constexpr FewProducts kBy[] = {few_products_of_run<1>, few_products_of_run<2>, few_products_of_run<3>,
                                 few_products_of_run<4>};
  if (depth % 4 == 0 && outputs <= 4) return kBy[outputs - 1];
#endif
  return nullptr;
}

// What a product reads: windows over maps of `depth` floats a pixel, of which `inputs` are channels, and packed
// weights, float or Bf16.
template <typename T>
struct Product {
  const Windows& windows;
  const T* weights;
  int rows, inputs, outputs, depth;
};

// The rows of a run: where each reads, and what it gives.
template <int kMost, typename T = float>
struct Run {
  static constexpr int kRows = kMost;
  const T* at[kMost];
  int sample[kMost], pixel[kMost];

  // in(sample): its map, of `depth` numbers a pixel.
  template <typename In>
  MG_METHOD Run(const Windows& w, int c, int64_t start, int count, int depth, const In& in) {
    const int first = w.first_output[c], outputs = w.first_output[c + 1] - first;
    int n = static_cast<int>(start / outputs), output = static_cast<int>(start % outputs);
    const T* map = in(n);
    for (int r = 0; r < count; ++r) {
      sample[r] = n;
      at[r] = map + static_cast<int64_t>(w.base[first + output]) * depth;
      pixel[r] = w.output[first + output];
      if (++output == outputs && r + 1 < count) map = in(++n), output = 0;
    }
  }
};

// What takes the numbers of each row of a run. Made once for all strips: where a row's numbers go takes about as long
// to find as a strip to finish.
template <typename Rows, typename Out>
struct Takes {
  using Take = decltype(std::declval<const Out&>()(0, 0));
  alignas(Take) unsigned char room[Rows::kRows * sizeof(Take)];

  MG_METHOD Takes(const Rows& run, int count, const Out& out) {
    for (int r = 0; r < count; ++r) new (room + r * sizeof(Take)) Take(out(run.sample[r], run.pixel[r]));
  }
  MG_METHOD const Take& operator[](int r) const { return reinterpret_cast<const Take*>(room)[r]; }
};

// Gives each row of a run what its tile holds of a strip or two.
template <typename Out, typename Taken>
MG_INLINE void give_rows(const Out&, const Taken& take, int count, int strip, float* tile, int wide) {
  for (int r = 0; r < count; ++r) take[r](strip, tile + r * kTileWidth, wide);
}

// W * in. in(sample): its map; out(sample, pixel): what takes (first strip, its numbers, strips), and may write over
// them.
template <typename Samples, typename In, typename Out>
MG_INLINE void each_product(const Samples& g, const Product<float>& p, const In& in, const Out& out) {
  const Windows& w = p.windows;
  const int64_t strip_size = 16LL * p.rows * p.inputs;
  const auto few = few_products(p.outputs, p.depth);
  const int most = few ? kFewRows : kRunRows;
  each_run_of_strips(g, w, most, strips_of(p.outputs), [&](int c, int64_t start, int count, int strip, int last) {
    alignas(64) float tile[kMostRows * kTileWidth];
    const Run<kMostRows> run(w, c, start, count, p.depth, in);
    const Taps taps = taps_of(w, c);
    const Takes<Run<kMostRows>, Out> take(run, count, out);
    if (few) {
      few(run.at, count, p.depth, p.inputs, taps, p.weights, tile);
      return give_rows(out, &take[0], count, strip, tile, 1);
    }
    for (; strip < last; strip += kWideAtOnce) {
      const int wide = last - strip < kWideAtOnce ? last - strip : kWideAtOnce;
      const float* weights = p.weights + strip * strip_size;
      if (wide == kWideAtOnce) {
        products_of_run<kWideAtOnce>(run.at, count, p.depth, p.inputs, taps, weights, strip_size, tile);
      } else {
        products_of_run<1>(run.at, count, p.depth, p.inputs, taps, weights, strip_size, tile);
      }
      give_rows(out, &take[0], count, strip, tile, wide);
    }
  });
}

}  // namespace mgebm::MGEBM_ISA
