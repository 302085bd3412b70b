// conv_chain: K Langevin steps of a stack of convolutions, x <- clamp(x - drift (clip(dE/dx) + ...) + noise_std eps),
// in one call; or dE/dx alone.
//
//   z_l = W_l * h_(l-1) + b_l;  h_l = a_l(norm_l(z_l));  dE/dh_L = head, the same for every sample
//
// Samples go in blocks of 16, the innermost dimension but one: activations are [block][pixel][sample][channel], the
// state [block][element][sample]. A convolution is then, at each output pixel, a sum over taps of (16 x C) (C x C')
// products, for any number of dimensions, stride, padding and dilation; a tap outside the map is left out, not
// multiplied by zero. Every number is summed in one order whatever the batch, the threads and the tiling are.
#pragma once

#include "ops/langevin_step.h"

namespace mgebm {

constexpr int kMaxStages = 32;
constexpr int kEdgePixels = 4;    // neighbouring pixels of the state that are computed together: a quad of noise
constexpr int kEdgeChannels = 4;  // and how many of its channels, or of a single one's rows

// Which inputs an output reads. Outputs that read the same taps at the same offsets form a class.
struct Windows {
  int classes, outputs;
  const int32_t* first_tap;     // (classes + 1)
  const int32_t* tap_pixel;     // input pixel of a tap, from the output's base
  const int32_t* tap_weight;    // its row of the packed weights
  const int32_t* first_output;  // (classes + 1)
  const int32_t* base;          // an output's first input pixel
  const int32_t* output;        // and its own index
  MGEBM_FIELDS(classes, outputs, first_tap, tap_pixel, tap_weight, first_output, base, output)
};

enum class Activation : int { kNone = 0, kLeaky = 1, kSilu = 2, kElu = 3 };

// Packed weights: [strip of 16 outputs][tap row][input channel, padded][16], bfloat16 with input channels in pairs.
struct ConvStage {
  // Of stage 0, backward is the edge: its outputs are runs of kEdgePixels pixels, or patches of as many rows of them.
  Windows forward, backward;
  const void *forward_weights, *backward_weights;
  int forward_rows, backward_rows;
  const float* bias;          // padded to whole strips; zeros where a norm follows
  const float *gamma, *beta;  // batch statistics, or null
  float eps, slope;
  Activation activation;
  int in_pixels, out_pixels, in_channels, out_channels;
  MGEBM_FIELDS(forward, backward, forward_weights, forward_rows, backward_weights, backward_rows, bias, gamma, beta,
               eps, slope, activation, in_pixels, out_pixels, in_channels, out_channels)
};

struct ConvChainParams {
  List<ConvStage, kMaxStages> stages;
  bool bfloat;
  const float* head;    // (top pixels, channels padded to whole strips): dE/dh_L
  float* x;             // (samples, elements), contiguous
  float* gradient;      // null: `steps` steps on x; else dE/dx into it, and x stays
  const uint8_t* mask;  // (samples, elements), 0 holds; or null
  int64_t samples, steps;
  int channels, pixels, row;  // of x; row: length of its last dimension
  int rows;                   // of a plane, where the edge's outputs are patches; else 0
  LangevinStepNumbers update;
  Counters counters;  // of the first step
  void* workspace;
  MGEBM_FIELDS(stages, bfloat, head, x, gradient, mask, samples, steps, channels, pixels, row, rows, update, counters,
               workspace)
};

// Rows of packed weights from any strided source: to[strip][row][channel][lane] <- the weight from input `channel` to
// output 16 strip + lane at from[rows[row] + channel input_stride + output output_stride]; zeros fill it up. With a run
// of several lanes an output, a row has as many entries, of which those below 0 are zeros.
struct ConvChainPack {
  const float* from;
  void* to;
  bool bfloat;
  bool rest;  // not the weights, but what rounding them to bfloat16 leaves
  const int64_t* rows;
  int row_count, inputs, depth, outputs;
  int64_t input_stride, output_stride;
  int run;  // 1, kEdgePixels, or 16
  MGEBM_FIELDS(from, to, bfloat, rest, rows, row_count, inputs, depth, outputs, input_stride, output_stride, run)
};
struct ConvChainPacks {
  List<ConvChainPack, 8 * kMaxStages> jobs;
  MGEBM_FIELDS(jobs)
};
void conv_chain_pack(const ConvChainPacks& packs, int threads);
bool all_finite(const float* numbers, int64_t count);
bool all_same(const void* one, const void* other, int64_t bytes);

}  // namespace mgebm
