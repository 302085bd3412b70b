// What a chain of convolutions holds while it runs, where its tiles lie, and how threads share a pass out. For
// *_cpu.cpp files only.
#pragma once

#include "mgebm/cpu.h"
#include "mgebm/interrupt.h"
#include "ops/conv_chain/activation.h"
#include "ops/conv_chain/tile.h"

namespace mgebm::MGEBM_ISA {

MG_INLINE int strips_of(int channels) { return (channels + 15) / 16; }

template <typename T>
constexpr int kDepthUnit = sizeof(T) == 2 ? 32 : 16;
template <typename T>
MG_INLINE int padded(int channels) {
  return (channels + kDepthUnit<T> - 1) / kDepthUnit<T> * kDepthUnit<T>;
}

// What a stage keeps between its forward and its backward, all [block][pixel]...
template <typename T>
struct Kept {
  T* h;            // [16][depth]: h_l, then dE/dz_l in its place
  T* z;            // [16][depth]: with batch statistics
  float* slope;    // [16][depth]: a'(z) of a curved activation without them
  uint16_t* mask;  // [strip][16]: the sign of what entered a piecewise linear activation
  float* sums;     // [2][strips * 16]: a pixel's share of the batch's statistics
  float* scale;    // [6][strips * 16]: gamma/std, beta, mean, 1/std; then mean(g), mean(g zh)
  int depth, strips;
};

template <typename T>
struct Engine {
  const ConvChainParams& p;
  Interrupt& interrupt;
  int blocks, threads, thread;  // thread: 0 is the caller's
  // This thread's blocks in every pass, so that they stay in its cache; or all threads share out all blocks.
  bool own;
  int first_block, last_block;
  float* x;       // [block][element][16]
  float* dx;      // the same; where the gradient is asked for or a row is not whole quads
  uint8_t* mask;  // the same
  uint64_t* ids;  // [block][16]
  Kept<T> kept[kMaxStages];

  int64_t elements() const { return static_cast<int64_t>(p.channels) * p.pixels; }
  bool fused() const { return !p.gradient && p.row % kEdgePixels == 0; }
  bool top(int l) const { return l + 1 == p.stages.count; }
  int valid(int block) const { return static_cast<int>(smaller(16, p.samples - 16LL * block)); }
  int mine() const { return last_block - first_block; }

  // Lays the buffers out from `base` on; returns the bytes they take.
  int64_t lay_out(char* base) {
    int64_t used = 0;
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<decltype(&*pointer)>(base + used);
      used += aligned(count * static_cast<int64_t>(sizeof(*pointer)));
    };
    const int64_t state = blocks * elements() * 16;
    take(x, state);
    take(dx, fused() ? 0 : state);
    take(mask, p.mask ? state : 0);
    take(ids, static_cast<int64_t>(blocks) * 16);
    for (int l = 0; l < p.stages.count; ++l) {
      const ConvStage& stage = p.stages.at[l];
      Kept<T>& k = kept[l];
      k.depth = padded<T>(stage.out_channels);
      k.strips = strips_of(stage.out_channels);
      const int64_t pixels = static_cast<int64_t>(blocks) * stage.out_pixels;
      take(k.h, pixels * 16 * k.depth);
      take(k.z, stage.gamma ? pixels * 16 * k.depth : 0);
      take(k.slope, curved(stage.activation) && !stage.gamma && !top(l) ? pixels * 16 * k.depth : 0);
      take(k.mask, stage.activation == Activation::kLeaky ? pixels * 16 * k.strips : 0);
      take(k.sums, stage.gamma ? pixels * 2 * k.strips * 16 : 0);
      take(k.scale, stage.gamma ? 6 * k.strips * 16 : 0);
    }
    return used;
  }

  // ---- where the tiles of 16 samples x 16 channels lie; `pixel` counts those of all blocks ----

  int64_t pixel_at(int l, int block, int pixel) const {
    return static_cast<int64_t>(block) * p.stages.at[l].out_pixels + pixel;
  }
  T* h_at(int l, int64_t pixel, int strip) const { return kept[l].h + pixel * 16 * kept[l].depth + 16 * strip; }
  float* slope_at(int l, int64_t pixel, int strip) const {
    return kept[l].slope + pixel * 16 * kept[l].depth + 16 * strip;
  }
  T* z_at(int l, int64_t pixel, int strip) const { return kept[l].z + pixel * 16 * kept[l].depth + 16 * strip; }
  uint16_t* mask_at(int l, int64_t pixel, int strip) const {
    return kept[l].mask + (pixel * kept[l].strips + strip) * 16;
  }
  float* sums_at(int l, int64_t pixel, int which, int strip) const {
    return kept[l].sums + ((pixel * 2 + which) * kept[l].strips + strip) * 16;
  }
  float* scale_at(int l, int which, int strip) const { return kept[l].scale + (which * kept[l].strips + strip) * 16; }
  // dE/dh_L at a pixel of the top map, the same for every sample.
  const float* head_at(int pixel, int strip) const {
    return p.head + (static_cast<int64_t>(pixel) * kept[p.stages.count - 1].strips + strip) * 16;
  }

  // ---- how threads divide a pass ----

  // body(0) ... body(count - 1): all by this thread where it owns its blocks; else divided among the threads, with a
  // barrier at the end. After an interrupt the rest is skipped and the call's results are dropped.
  template <typename Body>
  MG_METHOD void share(int64_t count, const Body& body) const {
    const auto unless_asked = [&](int64_t i) {
      if (thread == 0 && interrupt.poll()) begin_tiles();
      if (!interrupt.asked()) body(i);
    };
    if (own) {
      for (int64_t i = 0; i < count; ++i) unless_asked(i);
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) unless_asked(i);
    }
  }

  // The same for small pieces of equal work, divided statically.
  template <typename Body>
  MG_METHOD void share_evenly(int64_t count, const Body& body) const {
    if (own) {
      for (int64_t i = 0; i < count; ++i) body(i);
    } else {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) body(i);
    }
  }

  // body(block, pixel, strip) for every tile of a stage's map, divided among the threads.
  template <typename Body>
  MG_METHOD void each_tile(int l, const Body& body) const {
    const int64_t pixels = p.stages.at[l].out_pixels, first = first_block * pixels;
    share_evenly(mine() * pixels, [&](int64_t i) {
      const int64_t at = first + i;
      for (int strip = 0; strip < kept[l].strips; ++strip) {
        body(static_cast<int>(at / pixels), static_cast<int>(at % pixels), strip);
      }
    });
  }

  // body(pixel, samples of its block) for every pixel of a stage's map, in order.
  template <typename Body>
  MG_METHOD void each_pixel(int l, const Body& body) const {
    for (int block = 0; block < blocks; ++block) {
      for (int pixel = 0; pixel < p.stages.at[l].out_pixels; ++pixel) body(pixel_at(l, block, pixel), valid(block));
    }
  }
};

}  // namespace mgebm::MGEBM_ISA
