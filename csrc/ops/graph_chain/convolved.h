// What a convolution does with the numbers of its rows: bias and second added, then the step's function or slope, as
// `Finish` does it, a tile of rows at a time and in registers. For *_cpu.cpp files only.
#pragma once

#include "ops/graph_chain/team.h"

namespace mgebm::MGEBM_ISA {

struct Convolved {
  const GraphStep& s;
  int depth;
  // A buffer, and from one sample to the next; null: none.
  struct Place {
    float* base;
    int64_t stride;
    MG_METHOD float* at(int sample, int64_t offset) const { return base ? base + sample * stride + offset : nullptr; }
  };
  Place out, keep, slope, second;

  Convolved(const Group& g, const GraphStep& step)
      : s(step),
        depth(g.buffer(s.out).depth),
        out(place(g, s.out)),
        keep(place(g, s.keep)),
        slope(place(g, s.slope)),
        second(place(g, s.second)) {}
  static Place place(const Group& g, int buffer) {
    if (buffer < 0) return {nullptr, 0};
    return {g.at(buffer, 0), static_cast<int64_t>(g.buffer(buffer).pixels) * g.buffer(buffer).depth};
  }

  // Where the numbers of a (sample, pixel) go, from its first channel on.
  struct Row {
    float *out, *keep, *slope;
    const float *second, *top;
  };
  MG_METHOD Row operator()(int sample, int pixel) const {
    const int64_t at = static_cast<int64_t>(pixel) * depth;
    const float* const top = s.top && s.per_element ? s.top + at : s.top;
    return {out.at(sample, at), keep.at(sample, at), slope.at(sample, at), second.at(sample, at), top};
  }

  // end(row, channel, z) for every strip of the tile's rows, with z in `keep` where that is asked for.
  template <typename End>
  MG_METHOD void each(const Row* rows, int count, int first, const float* tile, int wide, const End& end) const {
    const float* const bias = s.bias ? s.bias + 16 * first : nullptr;
    for (int r = 0; r < count; ++r) {
      for (int i = 0; i < wide; ++i) {
        F16 z = load(tile + r * kTileWidth + 16 * i);
        const int channel = 16 * (first + i);
        if (bias) z = z + load(bias + 16 * i);
        if (rows[r].second) z = z + load(rows[r].second + channel);
        if (rows[r].keep) store(rows[r].keep + channel, z);
        end(rows[r], channel, z);
      }
    }
  }

  // A copy of its own for each function that is frequent: a switch for every sixteen numbers takes about as long as
  // they.
  MG_METHOD void operator()(const Row* rows, int count, int first, const float* tile, int wide) const {
    const bool back = s.slope >= 0, more = s.accumulate;
    const float a = s.a, b = s.b;
    const auto all_rows = [=, this](const auto& end)
                              __attribute__((always_inline)) { each(rows, count, first, tile, wide, end); };
    const auto give = [=](const Row& row, int channel, F16 z) __attribute__((always_inline)) {
      store(row.out + channel, more ? load(row.out + channel) + z : z);
    };
    // f(z) and f'(z): the numbers of a step, or at the top the gradient behind it times the slope.
    const auto curved = [=, this](const auto& both) __attribute__((always_inline)) {
      if (s.top) {
        return all_rows([=](const Row& row, int channel, F16 z) __attribute__((always_inline)) {
          store(row.out + channel, load(row.top + channel) * both(z).slope);
        });
      }
      all_rows([=](const Row& row, int channel, F16 z) __attribute__((always_inline)) {
        const Both<F16> found = both(z);
        give(row, channel, found.value);
        if (back) store(row.slope + channel, found.slope);
      });
    };
    switch (s.function) {
      case Function::kNone:
        if (!back) return all_rows(give);
        return all_rows([=](const Row& row, int channel, F16 z)
                            __attribute__((always_inline)) { give(row, channel, z * load(row.slope + channel)); });
      case Function::kLeaky:
        return all_rows([=](const Row& row, int channel, F16 z) __attribute__((always_inline)) {
          // f(z) has the sign of z.
          const uint16_t up = positive(back ? load(row.slope + channel) : z);
          const F16 v = row.top ? load(row.top + channel) : z;
          give(row, channel, select(up, v, a == 0.0f ? all(0.0f) : v * all(a)));
        });
      case Function::kSilu:
        return curved([](F16 z) __attribute__((always_inline)) { return silu_both(z); });
      case Function::kElu:
        return curved([=](F16 z) __attribute__((always_inline)) { return elu_both(z, a, b); });
      default:
        return curved([this](F16 z) __attribute__((always_inline)) {
          alignas(64) float value[16], slope[16];
          store(value, z);
          values_and_slopes(s, value, value, slope, 16);
          return Both<F16>{load(value), load(slope)};
        });
    }
  }
};

MG_INLINE void give_rows(const Convolved& out, const Convolved::Row* rows, int count, int strip, float* tile,
                         int wide) {
  out(rows, count, strip, tile, wide);
}

}  // namespace mgebm::MGEBM_ISA
