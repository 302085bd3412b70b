// All threads share out each pass over the whole batch: forward, energies, and backward from the top, where a layer's
// weights come before the data gradient, which takes the place of what they were multiplied by.
#include <omp.h>

#include "mgebm/cpu.h"
#include "ops/conv_chain/engine.h"
#include "ops/conv_learn/conv_learn.h"
#include "ops/conv_learn/outer_bfloat.h"
#include "ops/conv_learn/sums.h"

namespace mgebm::MGEBM_ISA {
namespace {

// What the norm of one strip of channels makes of z, in one of the two batches: z -> scale (z - mean) + beta.
struct Normal {
  F16 mean, rstd, gamma, beta;
};

struct Memory {
  float* h;        // h_l, then dL/dz_l in its place
  float* z;        // with batch statistics or a curved activation
  uint16_t* sign;  // [row][strip]: of what entered a piecewise linear activation
  double* sums;    // [sample][2][depth]: its share of a sum over all rows
  float* scale;    // [batch][4][depth]: mean, 1/std; then mean(g), mean(g zh)
  int depth, strips;
};

struct Learner : Team {
  const ConvLearnParams& p;
  int64_t count;  // samples
  float* x;       // [sample][pixel][channel]
  float* poison;  // [sample]: 0, or NaN where a pixel or a weight is not finite
  float* upstream;
  Memory kept[kMaxStages];
  Turned turned;  // the operands of one weight's gradient in bfloat16
  char* own;      // this thread's, for data gradients in bfloat16

  int64_t lay_out(char* base) {
    int64_t used = 0, h = 0, g = 0, run = 0;
    const auto take = [&](auto*& pointer, int64_t size) {
      pointer = reinterpret_cast<decltype(&*pointer)>(base + used);
      used += (size * static_cast<int64_t>(sizeof(*pointer)) + kAlign - 1) / kAlign * kAlign;
    };
    const ConvStage& first = stage(0);
    take(x, p.samples * first.in_pixels * first.in_channels);
    take(poison, p.samples);
    take(upstream, p.samples);
    for (int l = 0; l < p.stages.count; ++l) {
      const ConvStage& s = stage(l);
      Memory& k = kept[l];
      k.strips = strips_of(s.out_channels), k.depth = 16 * k.strips;
      const int64_t rows = p.samples * s.out_pixels;
      take(k.h, rows * k.depth);
      take(k.z, keeps_z(l) ? rows * k.depth : 0);
      take(k.sign, s.activation == Activation::kLeaky ? rows * k.strips : 0);
      take(k.sums, p.samples * 2 * k.depth);
      take(k.scale, s.gamma ? 8LL * k.depth : 0);
      if (l == 0 || !p.stages.at[l].bfloat) continue;
      run = larger(run, bfloat_run_bytes(s.backward, s.out_channels));
      if (!fills_tiles(p.samples)) continue;
      h = larger(h, static_cast<int64_t>(s.in_pixels) * kept[l - 1].depth);
      g = larger(g, static_cast<int64_t>(s.out_pixels) * k.depth);
    }
    take(turned.h, h * whole_samples(p.samples));
    take(turned.g, g * whole_samples(p.samples));
    take(own, run * threads);
    own += run * thread;
    return used;
  }

  const ConvStage& stage(int l) const { return p.stages.at[l].conv; }
  bool keeps_z(int l) const { return stage(l).gamma || curved(stage(l).activation); }
  int batch_of(int64_t sample) const { return sample < p.split ? 0 : 1; }
  float* scale(int l, int batch, int which) const { return kept[l].scale + (4 * batch + which) * kept[l].depth; }
  Normal normal(int l, int64_t sample, int strip) const {
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
    const Memory& k = kept[l];
    uint16_t sign = 0;
    store(k.h + row * k.depth + 16 * strip, activate(s, z, &sign));
    if (s.activation == Activation::kLeaky) k.sign[row * k.strips + strip] = sign;
  }

  // dL/dh times the activation's slope.
  MG_METHOD F16 back(int l, int64_t sample, int64_t row, int strip, F16 g) const {
    const ConvStage& s = stage(l);
    const Memory& k = kept[l];
    F16 y = all(0.0f);
    if (curved(s.activation)) {
      const Normal n = normal(l, sample, strip);
      y = multiply_add((load(k.z + row * k.depth + 16 * strip) - n.mean) * n.rstd, n.gamma, n.beta);
    }
    return times_slope(s, g, s.activation == Activation::kLeaky ? k.sign[row * k.strips + strip] : uint16_t{}, y);
  }

  const float* input(int l) const { return l ? kept[l - 1].h : x; }
  int input_depth(int l) const { return l ? kept[l - 1].depth : stage(0).in_channels; }

  void forward(int l) const {
    const ConvStage& s = stage(l);
    const Memory& k = kept[l];
    const int depth = input_depth(l);
    const float* const in = input(l);
    each_product(
        *this,
        {s.forward, static_cast<const float*>(s.forward_weights), s.forward_rows, s.in_channels, s.out_channels, depth},
        [&](int sample) { return in + static_cast<int64_t>(sample) * s.in_pixels * depth; },
        [&](int sample, int pixel) {
          const int64_t row = static_cast<int64_t>(sample) * s.out_pixels + pixel;
          return [&, row](int first, const float* sums, int strips) {
            for (int strip = first; strip < first + strips; ++strip, sums += 16) {
              const F16 z = load(sums) + load(s.bias + 16 * strip);
              if (keeps_z(l)) store(k.z + row * k.depth + 16 * strip, z);
              if (!s.gamma) activate_at(l, row, strip, z);
            }
          };
        });
    if (!s.gamma) return;
    statistics(l);
    each_piece(l, [&](int64_t sample, int64_t row, int rows) {
      for (int strip = 0; strip < k.strips; ++strip) {
        const Normal n = normal(l, sample, strip);
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
    const Memory& k = kept[l];
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
    const Memory& k = kept[l];
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
    const Memory& k = kept[l];
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
    const Memory& k = kept[top];
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
    const Memory& k = kept[l];
    const auto add = [&](float* to, int64_t c, int batch, double sum) {
      to[c] = batch ? static_cast<float>(to[c] + sum) : static_cast<float>(sum);
    };
    sum_rows(l, 0, [&](int64_t, int64_t row, int strip) { return load(k.h + row * k.depth + 16 * strip); });
    if (s.gamma) {
      sum_rows(l, 1, [&](int64_t sample, int64_t row, int strip) {
        const Normal n = normal(l, sample, strip);
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
        const Normal n = normal(l, sample, strip);
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
    const Memory& k = kept[l];
    backward_norm(l);
    const bool bfloat = p.stages.at[l].bfloat, turn = bfloat && fills_tiles(p.samples);
    const Outer outer{s.forward,      input(l),     k.h,      s.in_pixels, input_depth(l),       s.in_channels,
                      s.forward_rows, s.out_pixels, k.strips, p.samples,   p.stages.at[l].weight};
    turn ? bfloat_outer_sums(*this, outer, turned) : outer_sums(*this, outer);
    if (l == 0) return;
    const Memory& below = kept[l - 1];
    const auto in = [&](int sample) { return k.h + static_cast<int64_t>(sample) * s.out_pixels * k.depth; };
    const auto out = [&](int sample, int pixel) {
      const int64_t row = static_cast<int64_t>(sample) * s.in_pixels + pixel;
      return [&, sample, row](int first, const float* g, int strips) {
        for (int strip = first; strip < first + strips; ++strip, g += 16) {
          store(below.h + row * below.depth + 16 * strip, back(l - 1, sample, row, strip, load(g)));
        }
      };
    };
    const auto product = [&](const auto* w, auto... memory) {
      each_product(*this, {s.backward, w, s.backward_rows, s.out_channels, s.in_channels, k.depth}, memory..., in, out);
    };
    bfloat ? product(static_cast<const Bf16*>(s.backward_weights), own)
           : product(static_cast<const float*>(s.backward_weights));
  }

  // NaN in every energy where a weight is not finite: an activation may hide it.
  void check_weights() const {
    if (thread == 0) {
      float nothing = 0.0f;
      for (int l = 0; l < p.stages.count; ++l) nothing += nothing_of(stage(l));
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
  Learner measure{{interrupt, false, threads, 0}, p, p.samples};
  return measure.lay_out(nullptr);
}

void conv_learn_cpu(const ConvLearnParams& p, int threads) {
  Interrupt interrupt;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = omp_get_thread_num();
    Learner learner{{interrupt, me == 0, omp_get_num_threads(), me}, p, p.samples};
    learner.lay_out(static_cast<char*>(p.workspace));
    learner.run();
  }
}

}  // namespace mgebm::MGEBM_ISA
