// conv_learn: energies of a stack of convolutions, and the gradients of L = sum_i linear_i E_i + square_i E_i^2 in all
// of its weights, in one call.
//
//   z_l = W_l * h_(l-1) + b_l;  h_l = a_l(norm_l(z_l));  E = <head, h_L> + bias
//   u_i = dL/dE_i = linear_i + 2 square_i E_i;  dL/dh_L = u_i head
//   dL/dW_l = sum over (sample, pixel) pairs of (what the pixel read) (dL/dz_l)^T;  dL/dh_(l-1) = W_l^T * dL/dz_l
//
// A feature map is [sample][pixel][depth], depth being the channels filled up to whole strips of 16. Samples from
// `split` on have batch statistics of their own. Every number is summed in one order whatever the threads are.
#pragma once

#include "ops/conv_chain/conv_chain.h"

namespace mgebm {

// bfloat: backward_weights in bfloat16, and the operands of both gradients rounded to it. With `rest`, which is what
// rounding leaves of the forward weights, these are in bfloat16 too: z is then the sum of three products of bfloat16,
// W high(h) + rest high(h) + W low(h) with high(h) + low(h) = h to 17 bits. The first stage has none of this.
struct LearnStage {
  ConvStage conv;  // the first stage has no backward_weights
  bool bfloat;
  const void* rest;
  const int64_t* rows;  // a row of taps -> its place in the kernel, of `taps`
  int taps;
  float *weight, *bias;    // gradients: (outputs, inputs, taps), (whole strips); bias: also beta's
  float* gamma;            // with batch statistics, as the next two, of the samples before `split`
  float *mean, *variance;  // biased
  MGEBM_FIELDS(conv, bfloat, rest, rows, taps, weight, bias, gamma, mean, variance)
};

struct ConvLearnParams {
  List<LearnStage, kMaxStages> stages;
  const float* head;  // (top pixels, whole strips)
  float bias;
  const float* x;                        // (samples, channels, pixels), contiguous
  const float *linear, *square;          // (samples)
  float* energies;                       // (samples)
  float *head_gradient, *bias_gradient;  // as head; of what every energy has added to it
  int64_t samples, split;
  void* workspace;
  MGEBM_FIELDS(stages, head, bias, x, linear, square, energies, head_gradient, bias_gradient, samples, split, workspace)
};

}  // namespace mgebm
