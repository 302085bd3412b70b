// Parameters of a resident chain: where everything lies, by byte offsets. mgebm_fast/ops/conv_chain/resident_layout.py
// computes the layout; resident.h has the chain itself.
#pragma once

#include "ops/conv_chain/conv_chain.h"

namespace mgebm {

constexpr int kResidentNets = 4, kResidentStages = 16;

// Offsets "in the image" are those in shared memory too, "in memory" those from ResidentNet::memory.
struct ResidentWindows {
  int32_t tiles, tile_rows;                     // units of rows of one class, 16 or 32 each
  int32_t first_tap, first_tile, first_output;  // in the image: int32 (classes + 1)
  int32_t taps;                                 // in the image: int32 pairs (pixel from the base, row of weights)
  int32_t base, inside, output;  // in memory: int32 (outputs); inside: bit t, whether tap t is in the map
  MGEBM_FIELDS(tiles, tile_rows, first_tap, first_tile, first_output, taps, base, inside, output)
};

struct ResidentStage {
  ResidentWindows forward, backward;
  int32_t weights;  // in the image: 16-bit [row][8 out_chunks][8 in_chunks], in swizzled chunks
  int32_t bias;     // in the image: float (8 out_chunks)
  int32_t from;     // the stage whose h it reads, or of a shortcut z; -1: x
  int32_t reads;    // in shared memory: where that lies
  int32_t map;      // in shared memory: 16-bit [sample][out_pixels][8 out_chunks], in swizzled chunks
  int32_t z;        // the same for z, where a slope or a shortcut needs it; else -1
  int32_t in_pixels, out_pixels;
  int32_t in_chunks, out_chunks;  // 1, 2, 4, or a multiple of 8
  float slope;
  Activation activation;
  // A shortcut adds to the z of the stage after it, whose map and z are its own too; it has no bias and no activation.
  bool shortcut;
  bool adds;        // to z, what the shortcut before it left there
  bool adds_below;  // to dE/dz of `from`, what a shortcut of the same map left there
  MGEBM_FIELDS(forward, backward, weights, bias, from, reads, map, z, in_pixels, out_pixels, in_chunks, out_chunks,
               slope, activation, shortcut, adds, adds_below)
};

struct ResidentNet {
  const char* memory;  // the image, and behind it what is read from memory
  int32_t image_bytes;
  int32_t head, unscale;       // in memory: float (top pixels, 8 out_chunks), times a scale; one over that scale
  int32_t x, x_map, dx, zero;  // in shared memory; zero: 128 bytes of zeros, in the image
  int32_t channels, pixels;    // of x
  Extent size;
  int32_t samples;  // chains of a block at a time
  List<ResidentStage, kResidentStages> stages;
  const float* from;  // x at the start, or the smaller x that it is replicated from
  Extent factor;
  float* out;           // x at the end
  float* gradient;      // or null: dE/dx at the start alone
  const uint8_t* mask;  // (samples, elements), 0 holds; or null
  int64_t steps;
  LangevinStepNumbers numbers;
  Counters counters;  // of the first step
  MGEBM_FIELDS(memory, image_bytes, head, unscale, x, x_map, dx, zero, channels, pixels, size, samples, stages, from,
               factor, out, gradient, mask, steps, numbers, counters)
};

struct ResidentParams {
  int64_t samples, share;  // all chains; how many of them, one after the other, a block makes, of every net
  int64_t* bad_step;       // lowered to the first step at which an entry of dE/dx is not finite
  int32_t shared_bytes, warps, blocks;
  List<ResidentNet, kResidentNets> nets;
  MGEBM_FIELDS(samples, share, bad_step, shared_bytes, warps, blocks, nets)
};

}  // namespace mgebm
