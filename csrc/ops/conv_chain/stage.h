// Activation and norm of a stage's tiles, forward and backward. For *_cpu.cpp files only.
#pragma once

#include "ops/conv_chain/norm.h"

namespace mgebm::MGEBM_ISA {

// z_l -> h_l; at the top dE/dh_L a'(z_L) at once. With batch statistics: keeps z_l and the pixel's share of them.
template <typename T>
static void finish_forward(const Engine<T>& e, int l, int block, int pixel, int strip, float* tile) {
  const ConvStage& stage = e.p.stages.at[l];
  const int depth = e.kept[l].depth;
  const int64_t at = e.pixel_at(l, block, pixel);
  if (stage.gamma) {
    T* z = e.z_at(l, at, strip);
    for (int n = 0; n < 16; ++n) {
      store(z + n * depth, load(tile + n * kTileWidth));
      // Statistics of z as it is stored: normalised values then have mean 0, whatever the rounding of the store.
      store(tile + n * kTileWidth, load(z + n * depth));
    }
    statistics(tile, e.valid(block), e.sums_at(l, at, 0, strip), e.sums_at(l, at, 1, strip));
    return;
  }
  const F16 bias = load(stage.bias + 16 * strip);
  const F16 head = e.top(l) ? load(e.head_at(pixel, strip)) : bias;
  T* h = e.h_at(l, at, strip);
  if (stage.activation == Activation::kLeaky) {
    const Leaky leaky(stage);
    uint16_t* const sign = e.mask_at(l, at, strip);
    for (int n = 0; n < 16; ++n) {
      const F16 z = load(tile + n * kTileWidth) + bias;
      sign[n] = positive(z);
      store(h + n * depth, leaky.times_slope(e.top(l) ? head : z, sign[n]));
    }
    return;
  }
  const bool bent = curved(stage.activation);
  float* const slope = e.slope_at(l, at, strip);
  for (int n = 0; n < 16; ++n) {
    const F16 z = load(tile + n * kTileWidth) + bias;
    if (!bent) {
      store(h + n * depth, e.top(l) ? head : z);
      continue;
    }
    const Both<F16> both = curve(stage.activation, z);
    if (!e.top(l)) store(slope + n * depth, both.slope);
    store(h + n * depth, e.top(l) ? head * both.slope : both.value);
  }
}

// dE/dh_l a'(z_l), and with batch statistics a pixel's share of sum(g) and sum(g zh).
template <typename T>
static void finish_backward(const Engine<T>& e, int l, int block, int pixel, int strip, float* tile) {
  const ConvStage& stage = e.p.stages.at[l];
  const int depth = e.kept[l].depth;
  const int64_t at = e.pixel_at(l, block, pixel);
  T* h = e.h_at(l, at, strip);
  const uint16_t* sign = stage.activation == Activation::kLeaky ? e.mask_at(l, at, strip) : nullptr;
  if (sign && !stage.gamma) {
    const Leaky leaky(stage);
    for (int n = 0; n < 16; ++n) store(h + n * depth, leaky.times_slope(load(tile + n * kTileWidth), sign[n]));
    return;
  }
  if (!stage.gamma) {
    const bool bent = curved(stage.activation);
    const float* const slope = e.slope_at(l, at, strip);
    for (int n = 0; n < 16; ++n) {
      const F16 g = load(tile + n * kTileWidth);
      store(h + n * depth, bent ? g * load(slope + n * depth) : g);
    }
    return;
  }
  const T* z = e.z_at(l, at, strip);
  const Affine norm = affine(e, l, strip);
  F16 sum = all(0.0f), product = all(0.0f);
  const int count = e.valid(block);
  for (int n = 0; n < 16; ++n) {
    const F16 raw = load(z + n * depth);
    store(h + n * depth, times_slope(stage, load(tile + n * kTileWidth), sign ? sign[n] : 0, norm.of(raw)));
    if (n < count) {
      const F16 held = load(h + n * depth);
      sum = sum + held;
      product = multiply_add(held, norm.unit(raw), product);
    }
  }
  store(e.sums_at(l, at, 0, strip), sum);
  store(e.sums_at(l, at, 1, strip), product);
}

// h <- a(gamma zh + beta); at the top, dE/dh_L a'(gamma zh + beta) with its share of the sums.
template <typename T>
static void normalise(const Engine<T>& e, int l) {
  const ConvStage& stage = e.p.stages.at[l];
  const int depth = e.kept[l].depth;
  if (e.top(l)) {
    e.each_tile(l, [&](int block, int pixel, int strip) {
      alignas(64) float tile[16 * kTileWidth];
      const int64_t at = e.pixel_at(l, block, pixel);
      const Affine norm = affine(e, l, strip);
      const F16 head = load(e.head_at(pixel, strip));
      for (int n = 0; n < 16; ++n) {
        const F16 y = norm.of(load(e.z_at(l, at, strip) + n * depth));
        if (stage.activation == Activation::kLeaky) e.mask_at(l, at, strip)[n] = positive(y);
        store(tile + n * kTileWidth, head);
      }
      finish_backward(e, l, block, pixel, strip, tile);
    });
    return;
  }
  e.each_tile(l, [&](int block, int pixel, int strip) {
    const int64_t at = e.pixel_at(l, block, pixel);
    const Affine norm = affine(e, l, strip);
    const T* z = e.z_at(l, at, strip);
    T* h = e.h_at(l, at, strip);
    uint16_t* sign = e.mask_at(l, at, strip);
    for (int n = 0; n < 16; ++n) {
      const F16 y = norm.of(load(z + n * depth));
      uint16_t here = 0;
      store(h + n * depth, activate(stage, y, &here));
      if (stage.activation == Activation::kLeaky) sign[n] = here;
    }
  });
}

}  // namespace mgebm::MGEBM_ISA
