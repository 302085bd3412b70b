// All threads share out each pass over the whole batch: forward, energies, and backward from the top, where a layer's
// weights come before the data gradient, which takes the place of what they were multiplied by.
#include <omp.h>

#include "ops/conv_learn/state.h"
#include "ops/conv_learn/sums.h"

namespace mgebm::MGEBM_ISA {
namespace {

struct Learner : LearnState {
  // (sample, channel, pixel) -> [sample][pixel][channel]
  void read() const {
    const ConvStage& first = stage(0);
    const int64_t channels = first.in_channels, pixels = first.in_pixels;
    share(count, [&](int64_t n) {
      const float* in = p.x + n * channels * pixels;
      float* out = x + n * channels * pixels;
      float nothing = 0.0f;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < pixels; ++i) out[i * channels + c] = in[c * pixels + i];
      }
      for (int64_t i = 0; i < channels * pixels; ++i) nothing += 0.0f * in[i];
      poison[n] = nothing;
    });
  }

  // z in the place of h -> h.
  MG_METHOD void activate_at(int l, int64_t row, int strip, F16 z) const {
    const ConvStage& s = stage(l);
    const LearnMaps& k = kept[l];
    uint16_t sign = 0;
    store(k.h + row * k.depth + 16 * strip, activate(s, z, &sign));
    if (s.activation == Activation::kLeaky) k.sign[row * k.strips + strip] = sign;
  }

  // dL/dh times the activation's slope.
  MG_METHOD F16 back(int l, int64_t sample, int64_t row, int strip, F16 g) const {
    const ConvStage& s = stage(l);
    const LearnMaps& k = kept[l];
    F16 y = all(0.0f);
    if (curved(s.activation)) {
      const LearnNorm n = normal(l, sample, strip);
      y = multiply_add((load(k.z + row * k.depth + 16 * strip) - n.mean) * n.rstd, n.gamma, n.beta);
    }
    return times_slope(s, g, s.activation == Activation::kLeaky ? k.sign[row * k.strips + strip] : uint16_t{}, y);
  }

  void forward(int l) const {
    const ConvStage& s = stage(l);
    const LearnMaps& k = kept[l];
    const int depth = input_depth(l);
    const float* const in = input(l);
    const bool leaky = s.activation == Activation::kLeaky && !s.gamma;
    const Leaky slope(s);
    const auto take = [=, this, &s, &k](int64_t row, int first, const float* sums, int strips)
                          __attribute__((always_inline)) {
                            if (leaky) {
                              float* const h = k.h + row * k.depth + 16 * first;
                              uint16_t* const sign = k.sign + row * k.strips + first;
                              const float* const bias = s.bias + 16 * first;
                              for (int i = 0; i < strips; ++i) {
                                const F16 z = load(sums + 16 * i) + load(bias + 16 * i);
                                sign[i] = positive(z);
                                store(h + 16 * i, slope.times_slope(z, sign[i]));
                              }
                              return;
                            }
                            for (int strip = first; strip < first + strips; ++strip, sums += 16) {
                              const F16 z = load(sums) + load(s.bias + 16 * strip);
                              if (keeps_z(l)) store(k.z + row * k.depth + 16 * strip, z);
                              if (!s.gamma) activate_at(l, row, strip, z);
                            }
                          };
    if (const Bf16* rest = static_cast<const Bf16*>(p.stages.at[l].rest)) {
      to_blocks(*this, in, count, s.in_pixels, depth, blocked);
      const SplitWeights weights{static_cast<const Bf16*>(s.forward_weights), rest};
      each_product(*this, {s.forward, blocked, weights, s.in_pixels, padded<Bf16>(depth), s.forward_rows, k.strips},
                   [&](int64_t sample, int pixel, int first, const float* sums, int strips) {
                     take(sample * s.out_pixels + pixel, first, sums, strips);
                   });
    } else {
      each_product(
          *this,
          {s.forward, static_cast<const float*>(s.forward_weights), s.forward_rows, s.in_channels, s.out_channels,
           depth},
          [&](int sample) { return in + static_cast<int64_t>(sample) * s.in_pixels * depth; },
          [&](int sample, int pixel) {
            const int64_t row = static_cast<int64_t>(sample) * s.out_pixels + pixel;
            return [&, row](int first, const float* sums, int strips) { take(row, first, sums, strips); };
          });
    }
    if (!s.gamma) return;
    statistics(l);
    each_piece(l, [&](int64_t sample, int64_t row, int rows) {
      for (int strip = 0; strip < k.strips; ++strip) {
        const LearnNorm n = normal(l, sample, strip);
        for (int64_t r = row; r < row + rows; ++r) {
          const F16 z = load(k.z + r * k.depth + 16 * strip);
          activate_at(l, r, strip, multiply_add((z - n.mean) * n.rstd, n.gamma, n.beta));
        }
      }
    });
  }

  // A stage's sums over each sample's rows of body(sample, row, strip), by sample; `which` of two.
  template <typename Body>
  MG_METHOD void sum_rows(int l, int which, const Body& body) const {
    const LearnMaps& k = kept[l];
    const int pixels = stage(l).out_pixels;
    share(count, [&](int64_t n) {
      for (int strip = 0; strip < k.strips; ++strip) {
        const Sums sums = sum_of(pixels, [&](int64_t i) { return body(n, n * pixels + i, strip); });
        __builtin_memcpy(k.sums + (2 * n + which) * k.depth + 16 * strip, sums.at, sizeof sums.at);
      }
    });
  }

  // body(channel, batch, sum over the batch's samples, rows in all) for every channel and both batches, in order.
  template <typename Body>
  MG_METHOD void each_sum(int l, int which, const Body& body) const {
    const LearnMaps& k = kept[l];
    share(k.depth, [&](int64_t c) {
      for (int batch = 0; batch < 2; ++batch) {
        const int64_t first = batch ? p.split : 0, last = batch ? count : p.split;
        double sum = 0.0;
        for (int64_t n = first; n < last; ++n) sum += k.sums[(2 * n + which) * k.depth + c];
        body(c, batch, sum, static_cast<double>((last - first) * stage(l).out_pixels));
      }
    });
  }

  // Mean and 1/std of z in each of the two batches.
  void statistics(int l) const {
    const ConvStage& s = stage(l);
    const LearnStage& out = p.stages.at[l];
    const LearnMaps& k = kept[l];
    sum_rows(l, 0, [&](int64_t, int64_t row, int strip) { return load(k.z + row * k.depth + 16 * strip); });
    each_sum(l, 0, [&](int64_t c, int batch, double sum, double rows) {
      const float mean = static_cast<float>(rows > 0 ? sum / rows : 0);
      scale(l, batch, 0)[c] = mean;
      if (batch == 0) out.mean[c] = mean;
    });
    sum_rows(l, 0, [&](int64_t sample, int64_t row, int strip) {
      const F16 off = load(k.z + row * k.depth + 16 * strip) - load(scale(l, batch_of(sample), 0) + 16 * strip);
      return off * off;
    });
    each_sum(l, 0, [&](int64_t c, int batch, double sum, double rows) {
      const float variance = static_cast<float>(rows > 0 ? sum / rows : 0);
      // A variance beyond float32 would make all outputs 0: NaN instead, so that the update is seen to have failed.
      scale(l, batch, 1)[c] = variance <= 0x1.fffffep127f ? 1.0f / square_root(variance + s.eps) : __builtin_nanf("");
      if (batch == 0) out.variance[c] = variance;
    });
  }

  void energies() const {
    const int top = p.stages.count - 1;
    const LearnMaps& k = kept[top];
    const int64_t size = static_cast<int64_t>(stage(top).out_pixels) * k.depth;
    share(count, [&](int64_t n) {
      const float* h = k.h + n * size;
      const Sums sums = sum_of(size / 16, [&](int64_t i) { return load(h + 16 * i) * load(p.head + 16 * i); });
      double energy = 0.0;
      for (int i = 0; i < 16; ++i) energy += sums.at[i];
      const float e = static_cast<float>(energy + p.bias) + poison[n];
      p.energies[n] = e;
      upstream[n] = p.linear[n] + 2.0f * p.square[n] * e;
    });
    if (thread == 0) {
      double sum = 0.0;
      for (int64_t n = 0; n < count; ++n) sum += p.linear[n] + 2.0 * p.square[n] * p.energies[n];
      *p.bias_gradient = static_cast<float>(sum);
    }
    share(size / 16, [&](int64_t i) {
      const float* h = k.h + 16 * i;
      const Sums sums = sum_of(count, [&](int64_t n) { return load(h + n * size) * all(upstream[n]); });
      for (int lane = 0; lane < 16; ++lane) p.head_gradient[16 * i + lane] = static_cast<float>(sums.at[lane]);
    });
    each_piece(top, [&](int64_t sample, int64_t row, int rows) {
      const float* head = p.head + (row - sample * stage(top).out_pixels) * k.depth;
      for (int64_t r = row; r < row + rows; ++r, head += k.depth) {
        for (int strip = 0; strip < k.strips; ++strip) {
          const F16 g = load(head + 16 * strip) * all(upstream[sample]);
          store(k.h + r * k.depth + 16 * strip, back(top, sample, r, strip, g));
        }
      }
    });
  }

  // From dL/dy_l, in the place of h_l, the gradients of bias and norm; and dL/dz_l.
  void backward_norm(int l) const {
    const ConvStage& s = stage(l);
    const LearnStage& out = p.stages.at[l];
    const LearnMaps& k = kept[l];
    const auto add = [&](float* to, int64_t c, int batch, double sum) {
      to[c] = batch ? static_cast<float>(to[c] + sum) : static_cast<float>(sum);
    };
    sum_rows(l, 0, [&](int64_t, int64_t row, int strip) { return load(k.h + row * k.depth + 16 * strip); });
    if (s.gamma) {
      sum_rows(l, 1, [&](int64_t sample, int64_t row, int strip) {
        const LearnNorm n = normal(l, sample, strip);
        const int64_t at = row * k.depth + 16 * strip;
        return load(k.h + at) * ((load(k.z + at) - n.mean) * n.rstd);
      });
    }
    each_sum(l, 0, [&](int64_t c, int batch, double sum, double rows) {
      add(out.bias, c, batch, sum);
      if (s.gamma) scale(l, batch, 2)[c] = static_cast<float>(rows > 0 ? sum / rows : 0);
    });
    if (!s.gamma) return;
    each_sum(l, 1, [&](int64_t c, int batch, double sum, double rows) {
      add(out.gamma, c, batch, sum);
      scale(l, batch, 3)[c] = static_cast<float>(rows > 0 ? sum / rows : 0);
    });
    each_piece(l, [&](int64_t sample, int64_t row, int rows) {
      for (int strip = 0; strip < k.strips; ++strip) {
        const LearnNorm n = normal(l, sample, strip);
        const F16 g_mean = load(scale(l, batch_of(sample), 2) + 16 * strip);
        const F16 product_mean = load(scale(l, batch_of(sample), 3) + 16 * strip);
        for (int64_t r = row; r < row + rows; ++r) {
          const int64_t at = r * k.depth + 16 * strip;
          const F16 normalised = (load(k.z + at) - n.mean) * n.rstd;
          store(k.h + at, n.gamma * n.rstd * ((load(k.h + at) - g_mean) - normalised * product_mean));
        }
      }
    });
  }

  void backward(int l) const {
    const ConvStage& s = stage(l);
    const LearnMaps& k = kept[l];
    backward_norm(l);
    const bool bfloat = p.stages.at[l].bfloat, turn = bfloat && fills_tiles(p.samples);
    const Outer outer{s.forward,    input(l), k.h,       s.in_pixels, input_depth(l), s.in_channels, s.forward_rows,
                      s.out_pixels, k.strips, p.samples, sums};
    turn ? bfloat_outer_sums(*this, outer, turned) : outer_sums(*this, outer);
    give_sums(*this, outer, p.stages.at[l], s.out_channels);
    if (l == 0) return;
    const LearnMaps& below = kept[l - 1];
    const bool leaky = stage(l - 1).activation == Activation::kLeaky;
    const Leaky slope(stage(l - 1));
    const auto take = [=, this, &s, &below](int64_t sample, int pixel, int first, const float* g, int strips) {
      const int64_t row = sample * s.in_pixels + pixel;
      if (leaky) {
        float* const h = below.h + row * below.depth + 16 * first;
        const uint16_t* const sign = below.sign + row * below.strips + first;
        for (int i = 0; i < strips; ++i) store(h + 16 * i, slope.times_slope(load(g + 16 * i), sign[i]));
        return;
      }
      for (int strip = first; strip < first + strips; ++strip, g += 16) {
        store(below.h + row * below.depth + 16 * strip, back(l - 1, sample, row, strip, load(g)));
      }
    };
    if (bfloat) {
      to_blocks(*this, k.h, count, s.out_pixels, k.depth, {blocked.high, nullptr});
      const SplitWeights weights{static_cast<const Bf16*>(s.backward_weights), nullptr};
      const int depth = padded<Bf16>(k.depth);
      each_product(*this, {s.backward, blocked, weights, s.out_pixels, depth, s.backward_rows, below.strips}, take);
    } else {
      each_product(
          *this,
          {s.backward, static_cast<const float*>(s.backward_weights), s.backward_rows, s.out_channels, s.in_channels,
           k.depth},
          [&](int sample) { return k.h + static_cast<int64_t>(sample) * s.out_pixels * k.depth; },
          [&](int sample, int pixel) {
            return [&, sample, pixel](int first, const float* g, int strips) { take(sample, pixel, first, g, strips); };
          });
    }
  }

  // NaN in every energy where a weight is not finite: an activation may hide it.
  void check_weights() const {
    if (thread == 0) {
      float nothing = 0.0f;
      for (int l = 0; l < p.stages.count; ++l) nothing += nothing_of(p.stages.at[l]);
      for (int64_t n = 0; n < count; ++n) poison[n] += nothing;
    }
    meet();
  }

  void run() const {
    const KeepSubnormals kept_as_they_are;
    begin_tiles();
    read();
    check_weights();
    for (int l = 0; l < p.stages.count; ++l) forward(l);
    energies();
    for (int l = p.stages.count - 1; l >= 0; --l) backward(l);
    end_tiles();
  }
};

}  // namespace

int64_t conv_learn_workspace(const ConvLearnParams& p, int threads) {
  Interrupt interrupt;
  Learner measure{{{interrupt, false, threads, 0}, p, p.samples}};
  return measure.lay_out(nullptr);
}

void conv_learn_cpu(const ConvLearnParams& p, int threads) {
  Interrupt interrupt;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = omp_get_thread_num();
    Learner learner{{{interrupt, me == 0, omp_get_num_threads(), me}, p, p.samples}};
    learner.lay_out(static_cast<char*>(p.workspace));
    learner.run();
  }
}

}  // namespace mgebm::MGEBM_ISA
