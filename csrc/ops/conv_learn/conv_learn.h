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

struct LearnStage {
  ConvStage conv;          // forward_weights in float32; the first stage has no backward ones
  bool bfloat;             // backward_weights in bfloat16, and the operands of both gradients rounded to it
  float *weight, *bias;    // gradients: (tap rows, input channels, whole strips), (whole strips); bias: also beta's
  float* gamma;            // with batch statistics, as the next two, of the samples before `split`
  float *mean, *variance;  // biased
  MGEBM_FIELDS(conv, bfloat, weight, bias, gamma, mean, variance)
};

struct ConvLearnParams {
  List<LearnStage, kMaxStages> stages;
  const float* head;  // (top pixels, whole strips)
  float bias;
  const float* x;                // (samples, channels, pixels), contiguous
  const float *linear, *square;  // (samples)
  float* energies;               // (samples)
  float* head_gradient;          // as head
  int64_t samples, split;
  void* workspace;
  MGEBM_FIELDS(stages, head, bias, x, linear, square, energies, head_gradient, samples, split, workspace)
};

}  // namespace mgebm
