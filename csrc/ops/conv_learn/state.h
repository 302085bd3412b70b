// What a learning step keeps, and where its numbers lie. For *_cpu.cpp files only.
#pragma once

#include "mgebm/cpu.h"
#include "ops/conv_chain/engine.h"
#include "ops/conv_learn/blocked.h"
#include "ops/conv_learn/conv_learn.h"
#include "ops/conv_learn/outer_bfloat.h"

namespace mgebm::MGEBM_ISA {

// What the norm of one strip of channels makes of z, in one of the two batches: z -> scale (z - mean) + beta.
struct LearnNorm {
  F16 mean, rstd, gamma, beta;
};

struct LearnMaps {
  float* h;        // h_l, then dL/dz_l in its place
  float* z;        // with batch statistics or a curved activation
  uint16_t* sign;  // [row][strip]: of what entered a piecewise linear activation
  double* sums;    // [sample][2][depth]: its share of a sum over all rows
  float* scale;    // [batch][4][depth]: mean, 1/std; then mean(g), mean(g zh)
  int depth, strips;
};

struct LearnState : Team {
  const ConvLearnParams& p;
  int64_t count;  // samples
  float* x;       // [sample][pixel][channel]
  float* poison;  // [sample]: 0, or NaN where a pixel or a weight is not finite
  float* upstream;
  LearnMaps kept[kMaxStages];
  float* sums;      // of one stage's weight, as `outer_sums` leaves them
  Turned turned;    // the operands of one weight's gradient in bfloat16
  Blocked blocked;  // of one product of maps in bfloat16
  // What `sweep` asks: all threads share out all blocks.
  static constexpr bool own = false;
  static constexpr int first_block = 0;
  int mine() const { return static_cast<int>((p.samples + 15) / 16); }
  int valid(int block) const { return static_cast<int>(smaller(16, p.samples - 16LL * block)); }

  int64_t lay_out(char* base) {
    int64_t used = 0, h = 0, g = 0, high = 0, low = 0, weights = 0;
    const auto take = [&](auto*& pointer, int64_t size) {
      pointer = reinterpret_cast<decltype(&*pointer)>(base + used);
      used += aligned(size * static_cast<int64_t>(sizeof(*pointer)));
    };
    const ConvStage& first = stage(0);
    take(x, p.samples * first.in_pixels * first.in_channels);
    take(poison, p.samples);
    take(upstream, p.samples);
    for (int l = 0; l < p.stages.count; ++l) {
      const ConvStage& s = stage(l);
      LearnMaps& k = kept[l];
      k.strips = strips_of(s.out_channels), k.depth = 16 * k.strips;
      const int64_t rows = p.samples * s.out_pixels;
      take(k.h, rows * k.depth);
      take(k.z, keeps_z(l) ? rows * k.depth : 0);
      take(k.sign, s.activation == Activation::kLeaky ? rows * k.strips : 0);
      take(k.sums, p.samples * 2 * k.depth);
      take(k.scale, s.gamma ? 8LL * k.depth : 0);
      weights = larger(weights, static_cast<int64_t>(s.forward_rows) * s.in_channels * k.depth);
      if (l == 0 || !p.stages.at[l].bfloat) continue;
      const int64_t in = static_cast<int64_t>(s.in_pixels) * padded<Bf16>(kept[l - 1].depth);
      high = larger(high, larger(in, static_cast<int64_t>(s.out_pixels) * padded<Bf16>(k.depth)));
      if (p.stages.at[l].rest) low = larger(low, in);
      if (!fills_tiles(p.samples)) continue;
      h = larger(h, static_cast<int64_t>(s.in_pixels) * kept[l - 1].depth);
      g = larger(g, static_cast<int64_t>(s.out_pixels) * k.depth);
    }
    take(sums, weights);
    take(turned.h, h * whole_samples(p.samples));
    take(turned.g, g * whole_samples(p.samples));
    take(blocked.high, high * 16 * mine());
    take(blocked.low, low * 16 * mine());
    return used;
  }

  const ConvStage& stage(int l) const { return p.stages.at[l].conv; }
  bool keeps_z(int l) const { return stage(l).gamma || curved(stage(l).activation); }
  int batch_of(int64_t sample) const { return sample < p.split ? 0 : 1; }
  float* scale(int l, int batch, int which) const { return kept[l].scale + (4 * batch + which) * kept[l].depth; }
  LearnNorm normal(int l, int64_t sample, int strip) const {
    const ConvStage& s = stage(l);
    if (!s.gamma) return {all(0.0f), all(1.0f), all(1.0f), all(0.0f)};
    const int batch = batch_of(sample), at = 16 * strip;
    return {load(scale(l, batch, 0) + at), load(scale(l, batch, 1) + at), load(s.gamma + at), load(s.beta + at)};
  }

  // body(sample, first row, rows) for pieces of a stage's map.
  template <typename Body>
  MG_METHOD void each_piece(int l, const Body& body) const {
    constexpr int kPiece = 64;
    const int pixels = stage(l).out_pixels, pieces = (pixels + kPiece - 1) / kPiece;
    share(count * pieces, [&](int64_t i) {
      const int64_t sample = i / pieces, start = i % pieces * kPiece;
      body(sample, sample * pixels + start, static_cast<int>(smaller(kPiece, pixels - start)));
    });
  }

  const float* input(int l) const { return l ? kept[l - 1].h : x; }
  int input_depth(int l) const { return l ? kept[l - 1].depth : stage(0).in_channels; }
};

}  // namespace mgebm::MGEBM_ISA
