// Products in bfloat16 whose windows have no frame. For *_cpu.cpp files only.
#pragma once

#include "ops/graph_chain/convolve_bfloat.h"

namespace mgebm::MGEBM_ISA {

// The bytes of a run's operands: the number of each tap, then the rows' inputs of each.
static inline int64_t bfloat_run_bytes(const Windows& w, int inputs) {
  int most = 0;
  for (int c = 0; c < w.classes; ++c) {
    const int taps = taps_of(w, c).count;
    most = taps > most ? taps : most;
  }
  return numbers_bytes(most) + 2LL * kPairRows * most * padded<Bf16>(inputs);
}

// to[tap][row][depth] <- what up to 16 rows read; zero where there is no channel or no row.
static void round_rows(const float* const* rows, int count, int in_depth, int inputs, const Taps& taps, Bf16* to) {
  const int depth = padded<Bf16>(inputs), whole = inputs / 16 * 16;
  for (int t = 0; t < taps.count; ++t) {
    const int64_t tap = static_cast<int64_t>(taps.pixel[t]) * in_depth;
    for (int r = 0; r < 16; ++r, to += depth) {
      if (r >= count) {
        __builtin_memset(static_cast<void*>(to), 0, sizeof(Bf16) * depth);
        continue;
      }
      const float* from = rows[r] + tap;
      for (int k = 0; k < whole; k += 16) store(to + k, load(from + k));
      for (int k = whole; k < depth; k += 16) {
        float rest[16] = {};
        for (int i = 0; k + i < inputs; ++i) rest[i] = from[k + i];
        store(to + k, load(rest));
      }
    }
  }
}

// The same by bfloat16 operands; own: this thread's, bfloat_run_bytes.
template <typename Samples, typename In, typename Out>
static void each_product(const Samples& g, const Product<Bf16>& p, char* own, const In& in, const Out& out) {
  const Windows& w = p.windows;
  const int depth = padded<Bf16>(p.inputs), strips = (p.outputs + 15) / 16;
  const int64_t strip_size = 16LL * p.rows * depth;
  const Rows rows_of_run{16LL * depth, 1, depth, depth};
  each_run(g, w, kPairRows, [&](int c, int64_t start, int count) {
    alignas(64) float tile[2][16 * kTileWidth];
    const Run<kPairRows> run(w, c, start, count, p.depth, in);
    const Taps taps = taps_of(w, c);
    int32_t* numbers = reinterpret_cast<int32_t*>(own);
    for (int t = 0; t < taps.count; ++t) numbers[t] = t;
    Bf16* packed = reinterpret_cast<Bf16*>(own + numbers_bytes(taps.count));
    const int rows[2] = {count < 16 ? count : 16, count - 16}, blocks = count > 16 ? 2 : 1;
    Bf16* const a[2] = {packed, packed + taps.count * rows_of_run.pixel};
    for (int i = 0; i < blocks; ++i) round_rows(run.at + 16 * i, rows[i], p.depth, p.inputs, taps, a[i]);
    for (int strip = 0; strip < strips; strip += kStrips) {
      const int wide = strips - strip < kStrips ? strips - strip : kStrips;
      tiles<false>(a, rows, blocks, rows_of_run, {numbers, taps.weight, taps.count}, p.weights + strip * strip_size,
                   strip_size, wide, tile);
      for (int r = 0; r < count; ++r) {
        const auto take = out(run.sample[r], run.pixel[r]);
        take(strip, tile[r / 16] + r % 16 * kTileWidth, wide);
      }
    }
  });
}

}  // namespace mgebm::MGEBM_ISA
