// graph_chain: K Langevin steps of an energy given as a graph of layers, in one call; or dE/dx alone.
//
// The graph arrives as a program: the layers forward, the energy's gradient in the last of them, and the same layers
// backward to x, as a list of steps over buffers. A buffer is [sample][pixel][depth] floats, depth being the channels
// filled up to whole strips of 16. A matrix product's rows are (sample, pixel) pairs: one sample of a large map and
// many samples of a single pixel (a dense layer) fill them alike. What fills a strip up is written and never read.
//
// Every number is summed in one order whatever the batch, the threads and the grouping of samples are.
#pragma once

#include "ops/conv_chain/conv_chain.h"

namespace mgebm {

constexpr int kMaxGraphSteps = 1024;
constexpr int kMaxGraphBuffers = 1024;

// For every sample; offset in floats from where a sample's buffers begin, for a group of one.
struct GraphBuffer {
  int64_t offset;
  int pixels, depth;
  MGEBM_FIELDS(offset, pixels, depth)
};

// Sixteen numbers z of a step become f(z) in `out`, z itself in `keep` and f'(z) in `slope`, where those are given. On
// the backward pass there is no function, and z is multiplied by what `slope` holds; a leaky ReLU's slope is the sign
// of what it holds.
enum class GraphKind : int {
  kConvolve = 0,   // W * in + bias + second
  kGather = 1,     // sum over taps of weights[tap] in: pooling, upsampling, padding, and their transposes
  kPointwise = 2,  // in
  kAffine = 3,     // in weights + bias, either a channel's or an element's, for all samples or each; null: 1, 0
  kAdd = 4,        // in + factor second
  kMultiply = 5,   // in second
  kNorm = 6,       // weights (in - mean) / std + bias over a group of channels and all pixels; second: 1/std, mean
  kNormBack = 7,   // its gradient from in = dE/dy; second as there, third: what was normalised
  kFill = 8,       // bias, likewise
  // With neither function nor slope:
  kSoftmax = 9,       // softmax of in over the channels of one pixel, times second's first channel
  kLogSumExp = 10,    // log sum exp of in over the channels of one pixel
  kCopy = 11,         // channels from_channel ... + outputs of in to to_channel ... of out
  kMaxPool = 12,      // the greatest tap; keep: which one
  kMaxPoolBack = 13,  // in wherever `second` says so
  // As kAffine:
  kDepthwise = 14,  // sum over taps of weights[tap][channel] in[channel] + bias
  // As kCopy:
  kRearrange = 15,     // out[i] = in[place[i]], i over [pixel][depth]
  kRearrangeBack = 16  // out[place[i]] += in[i]
};

enum class Function : int {
  kNone = 0,
  kLeaky = 1,     // x > 0 ? x : a x
  kSilu = 2,      // x sigmoid(x)
  kElu = 3,       // b (x > 0 ? x : a (e^x - 1))
  kGelu = 4,      // x Phi(x)
  kGeluTanh = 5,  // its approximation by tanh
  kSoftplus = 6,  // log(1 + e^(a x)) / a, x where a x > b
  kTanh = 7,
  kSigmoid = 8,
  kMish = 9,  // x tanh(log(1 + e^x))
  kAbs = 10,
  kPower = 11,     // x^a, a whole number
  kClamp = 12,     // to [a, b], slope 1 at a and b
  kHardTanh = 13,  // to [a, b], slope 0 at a and b
  kExp = 14,
  kLog = 15,
  kSin = 16,
  kCos = 17,
  kSqrt = 18,
  kAnyLeaky = 19,  // kLeaky, also with a < 0, whose value does not show the slope
  kRoot = 20,      // kSqrt, slope 0 at 0: of the sum of squares of a vector's norm
  kStep = 21,      // x > a ? 1 : 0, with b x >= a; slope 0: a comparison
  kErf = 22,
  kArctan = 23,
  kRealPower = 24,  // x^a
};

struct GraphStep {
  GraphKind kind;
  int in, second, third, out, keep, slope;  // buffers; -1: none
  bool accumulate;                          // what the step gives is added to what out holds
  Windows windows;
  const float* weights;
  const void* bfloat_weights;  // of a product in bfloat16, in place of weights; channels filled up to whole tiles
  int rows;                    // of packed weights
  int inputs, outputs;         // channels
  const float* bias;
  bool per_element;    // weights and bias hold a number an element, [pixel][depth]
  int64_t row_floats;  // of an affine step or a fill with a row of them for each sample of the call; 0: one for all
  Function function;
  float a, b;
  float factor;
  int groups;
  float eps;
  int from_channel, to_channel;
  const int32_t* place;  // of a product in bfloat16: which pixel of `in` stands at each of the map that windows is of,
  int placed;            // which has so many; -1: zeros, around it. Of kRearrange: as there; -1: zero
  int64_t split;         // of a float32 product with one tap of one pixel that is the sum of three of bfloat16: where
                         // its weights begin among all such, in numbers; -1: it is none
  const float* top;      // of a convolution whose function is the last before a known dE/dh, a number a channel or an
                         // element: that times f'(z) goes into `out`, f(z) nowhere
  MGEBM_FIELDS(kind, in, second, third, out, keep, slope, accumulate, windows, weights, bfloat_weights, rows, inputs,
               outputs, bias, per_element, row_floats, function, a, b, factor, groups, eps, from_channel, to_channel,
               place, placed, split, top)
};

struct GraphChainParams {
  List<GraphBuffer, kMaxGraphBuffers> buffers;
  List<GraphStep, kMaxGraphSteps> steps;
  int64_t sample_floats;  // of all buffers of one sample
  int state, slope;       // the buffers of x and of dE/dx
  float* x;               // (samples, channels, pixels), contiguous
  float* gradient;        // null: `count` steps on x; else dE/dx into it, and x stays
  const uint8_t* mask;    // (samples, channels, pixels), 0 holds; or null
  int64_t samples, count;
  int channels, pixels;  // of x
  LangevinStepNumbers update;
  Counters counters;  // of the first step
  void* workspace;
  MGEBM_FIELDS(buffers, steps, sample_floats, state, slope, x, gradient, mask, samples, count, channels, pixels, update,
               counters, workspace)
};

}  // namespace mgebm
