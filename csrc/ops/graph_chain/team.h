// Who does what in a pass, and where a group of samples keeps its buffers. For *_cpu.cpp files only.
#pragma once

#include "mgebm/interrupt.h"
#include "ops/conv_chain/tile.h"
#include "ops/graph_chain/functions.h"

namespace mgebm::MGEBM_ISA {

// The threads that run a pass together.
struct Team {
  Interrupt& interrupt;
  bool caller;  // whether this is the thread that called, which alone may ask Python for signals
  int threads, thread;

  // body(i) for this thread's share of 0 ... pieces - 1; all have done theirs when it returns. Once an interrupt was
  // asked for, the rest is left out and the call's numbers are dropped.
  template <typename Body>
  MG_METHOD void share(int64_t pieces, const Body& body) const {
    const int64_t last = pieces * (thread + 1) / threads;
    for (int64_t i = pieces * thread / threads; i < last; ++i) {
      if (caller && interrupt.poll()) begin_tiles();
      if (interrupt.asked()) break;
      body(i);
    }
    meet();
  }
  void meet() const {
    if (threads > 1) {
#pragma omp barrier
    }
  }
};

// A group of samples with the threads that run it: one thread with a group of its own, or all threads on every step.
struct Group : Team {
  const GraphChainParams& p;
  int64_t first;    // sample
  int count, room;  // samples, and how many the buffers have room for
  float* base;
  char* rounded;      // for bfloat16 products: what one reads, of all samples
  char* own;          // and, this thread's, the operands of a run of rows
  const Bf16* split;  // the weights of split products

  float* at(int buffer, int sample) const {
    const GraphBuffer& b = p.buffers.at[buffer];
    return base + b.offset * room + static_cast<int64_t>(sample) * b.pixels * b.depth;
  }
  // Where a sample's constants begin in those of a step.
  int64_t row(const GraphStep& s, int sample) const { return (first + sample) * s.row_floats; }
  const GraphBuffer& buffer(int index) const { return p.buffers.at[index]; }
};

// What every step does with the sixteen numbers z that it made: z itself into `keep`, f(z) into `out` with f'(z) into
// `slope`; without a function, and for a leaky ReLU on the backward pass, z times what `slope` holds.
struct Finish {
  const GraphStep& s;
  float *out, *keep, *slope;

  Finish(const Group& g, const GraphStep& step, int sample)
      : s(step),
        out(g.at(step.out, sample)),
        keep(step.keep < 0 ? nullptr : g.at(step.keep, sample)),
        slope(step.slope < 0 ? nullptr : g.at(step.slope, sample)) {}

  MG_METHOD void operator()(int64_t at, F16 z) const {
    if (keep) store(keep + at, z);
    if (s.function == Function::kNone) {
      if (slope) z = z * load(slope + at);
    } else if (s.function == Function::kLeaky) {
      // f(z) has the sign of z.
      const uint16_t up = positive(slope ? load(slope + at) : z);
      z = select(up, z, s.a == 0.0f ? all(0.0f) : z * all(s.a));
    } else {
      alignas(64) float value[16], d[16];
      store(value, z);
      values_and_slopes(s, value, value, d, 16);
      z = load(value);
      if (slope) store(slope + at, load(d));
    }
    store(out + at, s.accumulate ? load(out + at) + z : z);
  }

  // The same of `strips` times sixteen numbers in a row.
  MG_METHOD void operator()(int64_t at, const float* z, int strips) const {
    const bool curved = s.function != Function::kNone && s.function != Function::kLeaky;
    if (curved && slope && !s.accumulate) {
      if (keep) __builtin_memcpy(keep + at, z, sizeof(float) * 16 * strips);
      return values_and_slopes(s, z, out + at, slope + at, 16 * strips);
    }
    for (int i = 0; i < strips; ++i) (*this)(at + 16 * i, load(z + 16 * i));
  }
};

// body(finish, sample, offset, strips) for pieces of out's map, of up to sixteen pixels.
template <typename Body>
MG_INLINE void each_piece(const Group& g, const GraphStep& s, const Body& body) {
  constexpr int kPiece = 16;
  const int pixels = g.buffer(s.out).pixels, depth = g.buffer(s.out).depth, pieces = (pixels + kPiece - 1) / kPiece;
  g.share(static_cast<int64_t>(g.count) * pieces, [&](int64_t i) {
    const int sample = static_cast<int>(i / pieces), start = static_cast<int>(i % pieces) * kPiece;
    const int some = pixels - start < kPiece ? pixels - start : kPiece;
    body(Finish(g, s, sample), sample, static_cast<int64_t>(start) * depth, some * depth / 16);
  });
}

// body(finish, sample, offset of a strip, its first channel) for every strip of out's map.
template <typename Body>
MG_INLINE void each_strip(const Group& g, const GraphStep& s, const Body& body) {
  const int depth = g.buffer(s.out).depth;
  each_piece(g, s, [&](const Finish& finish, int sample, int64_t at, int strips) {
    for (int i = 0, c = 0; i < strips; ++i, c = c + 16 < depth ? c + 16 : 0) body(finish, sample, at + 16 * i, c);
  });
}

// The rows of a class of windows, pairs of (sample, output), and the pieces of at most `most` that they are cut into.
MG_INLINE int64_t rows_of(const Windows& w, int c, int samples) {
  return static_cast<int64_t>(w.first_output[c + 1] - w.first_output[c]) * samples;
}
MG_INLINE int64_t runs_of(const Windows& w, int c, int samples, int most) {
  return (rows_of(w, c, samples) + most - 1) / most;
}

// Rows of one class of windows, at most `most` a piece, with all strips or some of them, where threads would have no
// work otherwise. body(class, first row, count, first strip, the one past the last): output
// `first_output[class] + i % outputs` of sample i / outputs, for i in first ... first + count - 1.
template <typename Samples, typename Body>
MG_INLINE void each_run_of_strips(const Samples& g, const Windows& w, int most, int strips, const Body& body) {
  int64_t runs = 0;
  for (int c = 0; c < w.classes; ++c) runs += runs_of(w, c, g.count, most);
  const int64_t wanted = g.threads > 1 && runs > 0 ? (4 * g.threads + runs - 1) / runs : 1;
  // Whole tiles of two strips.
  const int each = static_cast<int>((strips + 2 * wanted - 1) / (2 * wanted)) * 2;
  const int parts = (strips + each - 1) / each;
  int c = 0;
  int64_t before = 0;  // runs of the classes before c
  g.share(runs * parts, [&](int64_t i) {
    const int64_t run = i / parts;
    const int strip = static_cast<int>(i % parts) * each;
    int64_t here = runs_of(w, c, g.count, most);
    while (run >= before + here) {
      before += here;
      here = runs_of(w, ++c, g.count, most);
    }
    const int64_t start = (run - before) * most, rows = rows_of(w, c, g.count);
    const int count = static_cast<int>(rows - start < most ? rows - start : most);
    body(c, start, count, strip, strip + each < strips ? strip + each : strips);
  });
}

// The same of all strips.
template <typename Samples, typename Body>
MG_INLINE void each_run(const Samples& g, const Windows& w, int most, const Body& body) {
  each_run_of_strips(g, w, most, 1, [&](int c, int64_t start, int count, int, int) { body(c, start, count); });
}

}  // namespace mgebm::MGEBM_ISA
