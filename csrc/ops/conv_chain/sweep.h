// A convolution of a chain: its outputs cut into tasks that suit the caches, and their tiles. For *_cpu.cpp files only.
#pragma once

#include <unistd.h>

#include "ops/conv_chain/engine.h"
#include "ops/conv_chain/tile.h"

namespace mgebm::MGEBM_ISA {

// Half of a core's L2: a task's inputs stay there while weights stream through the rest.
static inline int64_t chunk_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr long found = 1 << 20;
#endif
  return found > (256 << 10) ? found / 2 : 128 << 10;
}

// body(block[], output[], base[], items, taps, strip, strips) for every pair of items (an output of a block) that
// read alike, and every pair of strips.
template <typename Samples, typename Body>
static void sweep(const Samples& e, const Windows& w, int all_strips, int64_t item_bytes, int64_t weight_bytes,
                  const Body& body) {
  const int pairs = (all_strips + kStrips - 1) / kStrips, mine = e.mine();
  const int64_t total = static_cast<int64_t>(w.outputs) * mine;
  int64_t chunk = larger(2, chunk_bytes() / larger(1, item_bytes));
  if (!e.own) chunk = smaller(chunk, larger(2, total * pairs / (32 * e.threads)));
  chunk += chunk & 1;
  int64_t chunks = 0;
  for (int c = 0; c < w.classes; ++c) {
    const int64_t items = static_cast<int64_t>(w.first_output[c + 1] - w.first_output[c]) * mine;
    chunks += (items + chunk - 1) / chunk;
  }
  // Loop order: inputs outside and weights inside, or the reverse; whichever reads less from memory.
  const int64_t inputs = total * item_bytes;
  const bool strips_outside = weight_bytes + inputs * pairs < inputs + weight_bytes * chunks;
  const auto run_task = [&](int64_t task) {
    int64_t index = strips_outside ? task % chunks : task / pairs;
    const int pair = static_cast<int>(strips_outside ? task / chunks : task % pairs);
    int c = 0;
    int64_t pixels = 0, items = 0;
    for (;; ++c) {
      pixels = w.first_output[c + 1] - w.first_output[c];
      items = pixels * mine;
      const int64_t here = (items + chunk - 1) / chunk;
      if (index < here) break;
      index -= here;
    }
    const Taps taps = taps_of(w, c);
    const int strip = pair * kStrips;
    const int strips = all_strips - strip < kStrips ? all_strips - strip : kStrips;
    const int64_t last = smaller(items, (index + 1) * chunk);
    for (int64_t item = index * chunk; item < last; item += 2) {
      int block[2], output[2], base[2];
      const int count = item + 1 < last ? 2 : 1;
      for (int i = 0; i < count; ++i) {
        const int64_t at = w.first_output[c] + (item + i) % pixels;
        block[i] = e.first_block + static_cast<int>((item + i) / pixels);
        output[i] = w.output[at];
        base[i] = w.base[at];
      }
      body(block, output, base, count, taps, strip, strips);
    }
  };
  e.share(chunks * pairs, run_task);
}

// The input of a convolution, [block][pixel][16][depth] in the chain's type; kState: the state, which is float32 in
// every chain (pixels of 0-255 would lose half a unit in bfloat16) and [block][channel][pixel][16].
template <typename S, bool kState>
struct Source {
  const S* at;
  int pixels, depth;

  Rows rows() const { return kState ? Rows{16, 16LL * pixels, 1, depth} : Rows{16LL * depth, 1, depth, depth}; }
};

struct Weights {
  const void* packed;  // in the source's type
  int rows, strips;
};

// finish(block, output, strip, tile) for the products of every output of `w`.
template <typename T, typename S, bool kState, typename Finish>
static void convolve(const Engine<T>& e, const Windows& w, const Source<S, kState>& source, const Weights& weights,
                     const Finish& finish) {
  const Rows in = source.rows();
  const int64_t block_size = 16LL * in.depth * source.pixels, strip_size = 16LL * weights.rows * in.depth;
  const S* packed = static_cast<const S*>(weights.packed);
  const int64_t item_bytes = 16LL * in.depth * sizeof(S) * larger(1, source.pixels / larger(1, w.outputs));
  sweep(e, w, weights.strips, item_bytes, weights.strips * strip_size * sizeof(S),
        [&](const int* block, const int* output, const int* base, int count, const Taps& taps, int strip, int wide) {
          alignas(64) float out[2][16 * kTileWidth];
          const S* a[2];
          int rows[2];
          for (int i = 0; i < count; ++i) {
            rows[i] = e.valid(block[i]);
            a[i] = source.at + block[i] * block_size + base[i] * in.pixel;
          }
          tiles<kState>(a, rows, count, in, taps, packed + strip * strip_size, strip_size, wide, out);
          for (int i = 0; i < count; ++i) {
            for (int s = 0; s < wide; ++s) finish(block[i], output[i], strip + s, out[i] + 16 * s);
          }
        });
}

}  // namespace mgebm::MGEBM_ISA
