// The steps of a graph that are no matrix products. For *_cpu.cpp files only.
#pragma once

#include "ops/graph_chain/team.h"

namespace mgebm::MGEBM_ISA {

static void pointwise(const Group& g, const GraphStep& s) {
  each_piece(g, s,
             [&](const Finish& finish, int n, int64_t at, int strips) { finish(at, g.at(s.in, n) + at, strips); });
}

static void affine(const Group& g, const GraphStep& s) {
  each_strip(g, s, [&](const Finish& finish, int n, int64_t at, int channel) {
    const int64_t place = g.row(s, n) + (s.per_element ? at : channel);
    F16 v = load(g.at(s.in, n) + at);
    if (s.weights) v = v * load(s.weights + place);
    finish(at, s.bias ? v + load(s.bias + place) : v);
  });
}

static void add(const Group& g, const GraphStep& s) {
  each_strip(g, s, [&](const Finish& finish, int n, int64_t at, int) {
    finish(at, multiply_add(load(g.at(s.second, n) + at), all(s.factor), load(g.at(s.in, n) + at)));
  });
}

static void multiply(const Group& g, const GraphStep& s) {
  each_strip(g, s, [&](const Finish& finish, int n, int64_t at, int) {
    finish(at, load(g.at(s.in, n) + at) * load(g.at(s.second, n) + at));
  });
}

static void fill(const Group& g, const GraphStep& s) {
  each_strip(g, s, [&](const Finish& finish, int n, int64_t at, int channel) {
    finish(at, load(s.bias + g.row(s, n) + (s.per_element ? at : channel)));
  });
}

static void copy(const Group& g, const GraphStep& s) {
  const int from = g.buffer(s.in).depth, to = g.buffer(s.out).depth;
  const int pixels = g.buffer(s.out).pixels;
  g.share(static_cast<int64_t>(g.count) * pixels, [&](int64_t i) {
    const int sample = static_cast<int>(i / pixels);
    const int64_t pixel = i % pixels;
    const float* in = g.at(s.in, sample) + pixel * from + s.from_channel;
    float* out = g.at(s.out, sample) + pixel * to + s.to_channel;
    for (int c = 0; c < s.outputs; ++c) out[c] = s.accumulate ? out[c] + in[c] : in[c];
  });
}

static void rearrange(const Group& g, const GraphStep& s) {
  constexpr int kPiece = 4096;
  const int pieces = (s.placed + kPiece - 1) / kPiece;
  g.share(static_cast<int64_t>(g.count) * pieces, [&](int64_t i) {
    const int sample = static_cast<int>(i / pieces), first = static_cast<int>(i % pieces) * kPiece;
    const int last = s.placed - first < kPiece ? s.placed : first + kPiece;
    const float* in = g.at(s.in, sample);
    float* out = g.at(s.out, sample);
    for (int at = first; at < last; ++at) {
      const float v = s.place[at] < 0 ? 0.0f : in[s.place[at]];
      out[at] = s.accumulate ? out[at] + v : v;
    }
  });
}

// A sample by one thread: several numbers may have come from one.
static void rearrange_back(const Group& g, const GraphStep& s) {
  const GraphBuffer& to = g.buffer(s.out);
  g.share(g.count, [&](int64_t sample) {
    const float* in = g.at(s.in, static_cast<int>(sample));
    float* out = g.at(s.out, static_cast<int>(sample));
    if (!s.accumulate) __builtin_memset(out, 0, sizeof(float) * to.pixels * to.depth);
    for (int at = 0; at < s.placed; ++at) {
      if (s.place[at] >= 0) out[s.place[at]] += in[at];
    }
  });
}

// body(sample, output pixel, first input pixel, taps) for every output of the windows.
template <typename Body>
MG_INLINE void each_window(const Group& g, const GraphStep& s, const Body& body) {
  const Windows& w = s.windows;
  each_run(g, w, 16, [&](int c, int64_t start, int count) {
    const int first = w.first_output[c], outputs = w.first_output[c + 1] - first;
    const Taps taps = taps_of(w, c);
    for (int64_t i = start; i < start + count; ++i) {
      const int output = first + static_cast<int>(i % outputs);
      body(static_cast<int>(i / outputs), w.output[output], w.base[output], taps);
    }
  });
}

static void gather(const Group& g, const GraphStep& s) {
  const int depth = g.buffer(s.out).depth;
  each_window(g, s, [&](int sample, int output, int base, const Taps& taps) {
    const float* in = g.at(s.in, sample) + static_cast<int64_t>(base) * depth;
    const Finish finish(g, s, sample);
    for (int c = 0; c < depth; c += 16) {
      F16 sum = all(0.0f);
      for (int t = 0; t < taps.count; ++t) {
        sum = multiply_add(load(in + static_cast<int64_t>(taps.pixel[t]) * depth + c), all(s.weights[taps.weight[t]]),
                           sum);
      }
      finish(static_cast<int64_t>(output) * depth + c, sum);
    }
  });
}

// Strips of pixels of a class, so many together, that share each weight they load; a pixel's go on as one piece.
constexpr int kDepthwisePixels = 4, kDepthwiseStrips = 8;

template <int kPixels>
MG_INLINE void depthwise_pixels(const GraphStep& s, const float* const* in, const Taps& taps, int depth, int first,
                                int strips, float (*out)[16 * kDepthwiseStrips]) {
  for (int i = 0; i < strips; ++i) {
    const int channel = first + 16 * i;
    F16 sum[kPixels];
    for (int r = 0; r < kPixels; ++r) sum[r] = s.bias ? load(s.bias + channel) : all(0.0f);
    for (int t = 0; t < taps.count; ++t) {
      const F16 weight = load(s.weights + static_cast<int64_t>(taps.weight[t]) * depth + channel);
      const int64_t at = static_cast<int64_t>(taps.pixel[t]) * depth + channel;
      for (int r = 0; r < kPixels; ++r) sum[r] = multiply_add(load(in[r] + at), weight, sum[r]);
    }
    for (int r = 0; r < kPixels; ++r) store(out[r] + 16 * i, sum[r]);
  }
}

static void depthwise(const Group& g, const GraphStep& s) {
  const Windows& w = s.windows;
  const int depth = g.buffer(s.out).depth;
  each_run(g, w, kDepthwisePixels, [&](int c, int64_t start, int count) {
    const int first = w.first_output[c], outputs = w.first_output[c + 1] - first;
    const Taps taps = taps_of(w, c);
    const float* in[kDepthwisePixels];
    int sample[kDepthwisePixels];
    int64_t at[kDepthwisePixels];
    for (int r = 0; r < count; ++r) {
      const int output = first + static_cast<int>((start + r) % outputs);
      sample[r] = static_cast<int>((start + r) / outputs);
      at[r] = static_cast<int64_t>(w.output[output]) * depth;
      in[r] = g.at(s.in, sample[r]) + static_cast<int64_t>(w.base[output]) * depth;
    }
    for (int channel = 0; channel < depth; channel += 16 * kDepthwiseStrips) {
      alignas(64) float sums[kDepthwisePixels][16 * kDepthwiseStrips];
      const int left = (depth - channel) / 16, strips = left < kDepthwiseStrips ? left : kDepthwiseStrips;
      if (count == kDepthwisePixels) {
        depthwise_pixels<kDepthwisePixels>(s, in, taps, depth, channel, strips, sums);
      } else {
        for (int r = 0; r < count; ++r) depthwise_pixels<1>(s, in + r, taps, depth, channel, strips, sums + r);
      }
      for (int r = 0; r < count; ++r) Finish(g, s, sample[r])(at[r] + channel, sums[r], strips);
    }
  });
}

// `weights` holds the number of each tap; keep: that of the greatest, the first of them where several are.
static void max_pool(const Group& g, const GraphStep& s) {
  const int depth = g.buffer(s.out).depth;
  each_window(g, s, [&](int sample, int output, int base, const Taps& taps) {
    const float* in = g.at(s.in, sample) + static_cast<int64_t>(base) * depth;
    float* out = g.at(s.out, sample) + static_cast<int64_t>(output) * depth;
    float* which = g.at(s.keep, sample) + static_cast<int64_t>(output) * depth;
    for (int c = 0; c < depth; ++c) {
      float best = -__builtin_inff(), tap = -1.0f;
      for (int t = 0; t < taps.count; ++t) {
        const float v = in[static_cast<int64_t>(taps.pixel[t]) * depth + c];
        if (!(v <= best) || tap < 0.0f) best = v, tap = s.weights[taps.weight[t]];
      }
      out[c] = best, which[c] = tap;
    }
  });
}

static void max_pool_back(const Group& g, const GraphStep& s) {
  const int depth = g.buffer(s.out).depth;
  each_window(g, s, [&](int sample, int pixel, int base, const Taps& taps) {
    const float* in = g.at(s.in, sample) + static_cast<int64_t>(base) * depth;
    const float* which = g.at(s.second, sample) + static_cast<int64_t>(base) * depth;
    float* out = g.at(s.out, sample) + static_cast<int64_t>(pixel) * depth;
    for (int c = 0; c < depth; ++c) {
      float sum = 0.0f;
      for (int t = 0; t < taps.count; ++t) {
        const int64_t at = static_cast<int64_t>(taps.pixel[t]) * depth + c;
        sum += which[at] == s.weights[taps.weight[t]] ? in[at] : 0.0f;
      }
      out[c] = s.accumulate ? out[c] + sum : sum;
    }
  });
}

// sums[c] <- sum over pixels of body(offset of a strip); a channel's sum runs over pixels in order.
template <typename Body>
MG_INLINE void over_pixels(int pixels, int depth, float* sums, const Body& body) {
  for (int c = 0; c < depth; c += 16) {
    F16 sum = all(0.0f);
    for (int p = 0; p < pixels; ++p) sum = sum + body(static_cast<int64_t>(p) * depth + c, c);
    store(sums + c, sum);
  }
}

// The mean over a group of channels of what `sums` holds, to each of them.
MG_INLINE void over_groups(float* sums, int channels, int groups, double count) {
  const int each = channels / groups;
  for (int i = 0; i < groups; ++i) {
    double sum = 0;
    for (int c = i * each; c < (i + 1) * each; ++c) sum += sums[c];
    for (int c = i * each; c < (i + 1) * each; ++c) sums[c] = static_cast<float>(sum / count);
  }
}

constexpr int kNormChannels = 4096;

// `second`: two pixels, 1/std and the mean.
static void normalise(const Group& g, const GraphStep& s) {
  const int pixels = g.buffer(s.in).pixels, depth = g.buffer(s.in).depth;
  const double count = static_cast<double>(s.inputs) / s.groups * pixels;
  g.share(g.count, [&](int64_t i) {
    const int sample = static_cast<int>(i);
    const float* in = g.at(s.in, sample);
    float *inverse = g.at(s.second, sample), *mean = inverse + depth;
    const Finish finish(g, s, sample);
    over_pixels(pixels, depth, mean, [&](int64_t at, int) { return load(in + at); });
    over_groups(mean, s.inputs, s.groups, count);
    over_pixels(pixels, depth, inverse, [&](int64_t at, int c) {
      const F16 d = load(in + at) - load(mean + c);
      return d * d;
    });
    over_groups(inverse, s.inputs, s.groups, count);
    for (int c = 0; c < depth; ++c) {
      inverse[c] = c < s.inputs ? 1.0f / __builtin_sqrtf(inverse[c] + s.eps) : 0.0f;
      mean[c] = c < s.inputs ? mean[c] : 0.0f;
    }
    for (int pixel = 0; pixel < pixels; ++pixel) {
      for (int c = 0; c < depth; c += 16) {
        const int64_t at = static_cast<int64_t>(pixel) * depth + c, place = s.per_element ? at : c;
        const F16 u = (load(in + at) - load(mean + c)) * load(inverse + c);
        finish(at, s.weights ? multiply_add(u, load(s.weights + place), load(s.bias + place)) : u);
      }
    }
  });
}

// With u the normalised input, g = weights dE/dy and means over a group:  dE/dz = (g - mean(g) - u mean(g u)) / std.
// `third`: z; `second`: as above.
static void normalise_back(const Group& g, const GraphStep& s) {
  const int pixels = g.buffer(s.in).pixels, depth = g.buffer(s.in).depth;
  const double count = static_cast<double>(s.inputs) / s.groups * pixels;
  g.share(g.count, [&](int64_t i) {
    const int sample = static_cast<int>(i);
    alignas(64) float share[kNormChannels], product[kNormChannels];
    const float *in = g.at(s.in, sample), *z = g.at(s.third, sample);
    const float *inverse = g.at(s.second, sample), *mean = inverse + depth;
    const Finish finish(g, s, sample);
    const auto slope_at = [&](int64_t at, int64_t c) {
      return s.weights ? load(in + at) * load(s.weights + (s.per_element ? at : c)) : load(in + at);
    };
    const auto unit_at = [&](int64_t at, int64_t c) { return (load(z + at) - load(mean + c)) * load(inverse + c); };
    over_pixels(pixels, depth, share, [&](int64_t at, int c) { return slope_at(at, c); });
    over_groups(share, s.inputs, s.groups, count);
    over_pixels(pixels, depth, product, [&](int64_t at, int c) { return slope_at(at, c) * unit_at(at, c); });
    over_groups(product, s.inputs, s.groups, count);
    for (int pixel = 0; pixel < pixels; ++pixel) {
      for (int c = 0; c < depth; c += 16) {
        const int64_t at = static_cast<int64_t>(pixel) * depth + c;
        const F16 centred = slope_at(at, c) - load(share + c) - unit_at(at, c) * load(product + c);
        finish(at, centred * load(inverse + c));
      }
    }
  });
}

// out = softmax(in) scale, or log sum exp(in), over the channels of one pixel.
static void log_sum_exp(const Group& g, const GraphStep& s, bool back) {
  g.share(g.count, [&](int64_t i) {
    const int sample = static_cast<int>(i);
    const float* in = g.at(s.in, sample);
    float* out = g.at(s.out, sample);
    float most = in[0];
    for (int c = 1; c < s.inputs; ++c) most = in[c] > most ? in[c] : most;
    double sum = 0;
    for (int c = 0; c < s.inputs; ++c) sum += static_cast<double>(exponential(in[c] - most));
    if (!back) {
      out[0] = most + __builtin_logf(static_cast<float>(sum));
      return;
    }
    const float scale = static_cast<float>(static_cast<double>(g.at(s.second, sample)[0]) / sum);
    for (int c = 0; c < s.inputs; ++c) {
      const float v = exponential(in[c] - most) * scale;
      out[c] = s.accumulate ? out[c] + v : v;
    }
  });
}

}  // namespace mgebm::MGEBM_ISA
