// Batch statistics of a chain of convolutions: y = gamma zh + beta, zh = (z - mean) / sqrt(var + eps). With g = dE/dy,
// means over the batch's samples and pixels,  dE/dz = gamma / sqrt(var + eps) (g - mean(g) - zh mean(g zh)).
// For *_cpu.cpp files only.
#pragma once

#include "ops/conv_chain/engine.h"
#include "ops/conv_chain/tile.h"

namespace mgebm::MGEBM_ISA {

struct Affine {
  F16 scale, beta, mean, inverse_std;
  // The mean goes first: z and it may be far larger than their difference.
  MG_METHOD F16 of(F16 z) const { return multiply_add(z - mean, scale, beta); }
  MG_METHOD F16 unit(F16 z) const { return (z - mean) * inverse_std; }
};
template <typename T>
MG_INLINE Affine affine(const Engine<T>& e, int l, int strip) {
  if (!e.p.stages.at[l].gamma) return {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
  return {load(e.scale_at(l, 0, strip)), load(e.scale_at(l, 1, strip)), load(e.scale_at(l, 2, strip)),
          load(e.scale_at(l, 3, strip))};
}

// A pixel's share of the statistics: the mean, and the squared distances from it, of rows 0 ... count - 1.
static inline void statistics(const float* tile, int count, float* mean_at, float* square_at) {
  F16 sum = all(0.0f), square = all(0.0f);
  for (int n = 0; n < count; ++n) sum = sum + load(tile + n * kTileWidth);
  const F16 mean = sum * all(1.0f / static_cast<float>(count));
  for (int n = 0; n < count; ++n) {
    const F16 d = load(tile + n * kTileWidth) - mean;
    square = multiply_add(d, d, square);
  }
  store(mean_at, mean);
  store(square_at, square);
}

// Means and variances of the batch from the pixels' shares, in double: one order, whatever the threads.
template <typename T>
static void reduce_statistics(const Engine<T>& e, int l) {
  const ConvStage& stage = e.p.stages.at[l];
  const double total = static_cast<double>(e.p.samples) * stage.out_pixels;
#pragma omp barrier
#pragma omp for schedule(static)
  for (int strip = 0; strip < e.kept[l].strips; ++strip) {
    double mean[16] = {}, square[16] = {};
    e.each_pixel(l, [&](int64_t at, int count) {
      const float* m = e.sums_at(l, at, 0, strip);
      for (int i = 0; i < 16; ++i) mean[i] += static_cast<double>(m[i]) * count;
    });
    for (int i = 0; i < 16; ++i) mean[i] /= total;
    e.each_pixel(l, [&](int64_t at, int count) {
      const float *m = e.sums_at(l, at, 0, strip), *s = e.sums_at(l, at, 1, strip);
      for (int i = 0; i < 16; ++i) {
        const double d = m[i] - mean[i];
        square[i] += s[i] + count * d * d;
      }
    });
    for (int i = 0; i < 16; ++i) {
      const int c = 16 * strip + i;
      const bool real = c < stage.out_channels;
      const double inverse_std = real ? 1.0 / __builtin_sqrt(square[i] / total + static_cast<double>(stage.eps)) : 0.0;
      const double scale = real ? stage.gamma[c] * inverse_std : 0.0;
      e.scale_at(l, 0, strip)[i] = static_cast<float>(scale);
      e.scale_at(l, 1, strip)[i] = real ? stage.beta[c] : 0.0f;
      e.scale_at(l, 2, strip)[i] = static_cast<float>(mean[i]);
      e.scale_at(l, 3, strip)[i] = static_cast<float>(inverse_std);
    }
  }
}

// mean(g) and mean(g zh), the same way.
template <typename T>
static void reduce_gradient(const Engine<T>& e, int l) {
  const double total = static_cast<double>(e.p.samples) * e.p.stages.at[l].out_pixels;
#pragma omp barrier
#pragma omp for schedule(static)
  for (int strip = 0; strip < e.kept[l].strips; ++strip) {
    for (int which = 0; which < 2; ++which) {
      double sum[16] = {};
      e.each_pixel(l, [&](int64_t at, int) {
        const float* share = e.sums_at(l, at, which, strip);
        for (int i = 0; i < 16; ++i) sum[i] += share[i];
      });
      for (int i = 0; i < 16; ++i) e.scale_at(l, 4 + which, strip)[i] = static_cast<float>(sum[i] / total);
    }
  }
}

// g <- gamma / std (g - mean(g) - zh mean(g zh))
template <typename T>
static void centre(const Engine<T>& e, int l) {
  const int depth = e.kept[l].depth;
  e.each_tile(l, [&](int block, int pixel, int strip) {
    const int64_t at = e.pixel_at(l, block, pixel);
    const Affine norm = affine(e, l, strip);
    const F16 mean = load(e.scale_at(l, 4, strip)), product = load(e.scale_at(l, 5, strip));
    const T* z = e.z_at(l, at, strip);
    T* h = e.h_at(l, at, strip);
    for (int n = 0; n < 16; ++n) {
      const F16 unit = norm.unit(load(z + n * depth));
      store(h + n * depth, (load(h + n * depth) - mean - unit * product) * norm.scale);
    }
  });
}

}  // namespace mgebm::MGEBM_ISA
