// One parallel region runs all steps. `Sharing` says who does what in it: without batch statistics each thread runs the
// whole chain of some samples and waits for nobody.
//
//   forward   z_l -> [statistics -> normalise] -> h_l      last stage: dE/dh_L a'(z_L) at once, h_L is never made
//   backward  [centre] -> dE/dh_(l-1) a'(z_(l-1))           the same products with the other weights
//   edge      dE/dx -> Langevin update                      where a row is whole quads; else by way of memory
//
// Batch statistics: y = gamma zh + beta, zh = (z - mean) / sqrt(var + eps). With g = dE/dy, means over the batch's
// samples and pixels,  dE/dz = gamma / sqrt(var + eps) (g - mean(g) - zh mean(g zh)).
#include <omp.h>
#include <unistd.h>

#include "mgebm/conv_tile.h"
#include "mgebm/cpu.h"
#include "mgebm/noise_block.h"
#include "ops/conv_chain.h"

namespace mgebm::MGEBM_ISA {
namespace {

constexpr int64_t kAlign = 64;

// Half of a core's second cache: the inputs of one task, beside which its weights pass by.
int64_t chunk_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr long found = 1 << 20;
#endif
  return found > (256 << 10) ? found / 2 : 128 << 10;
}

// Members cannot be MG_INLINE, which is static.
#define MG_METHOD inline __attribute__((always_inline))

MG_INLINE int strips_of(int channels) { return (channels + 15) / 16; }
MG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MG_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T>
constexpr int kDepthUnit = sizeof(T) == 2 ? 32 : 16;
template <typename T>
MG_INLINE int padded(int channels) {
  return (channels + kDepthUnit<T> - 1) / kDepthUnit<T> * kDepthUnit<T>;
}

// e^x to about 1e-7 of its value; its own polynomial, so that it vectorises on every CPU.
MG_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = static_cast<float>(static_cast<int32_t>(x * 1.44269504f + (x < 0.0f ? -0.5f : 0.5f)));
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.98756915e-4f;
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345192e-3f;
  p = p * r + 4.16657955e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * r * r + r + 1.0f;
  return p * as_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

MG_INLINE F16 each(F16 in, float (*function)(float)) {
  alignas(64) float v[16];
  store(v, in);
#pragma omp simd
  for (int i = 0; i < 16; ++i) v[i] = function(v[i]);
  return load(v);
}

MG_INLINE float silu(float z) { return z / (1.0f + exponential(-z)); }
MG_INLINE float silu_slope(float z) {
  const float s = 1.0f / (1.0f + exponential(-z));
  return s * (1.0f + z * (1.0f - s));
}
MG_INLINE float elu(float z) { return z > 0.0f ? z : exponential(z) - 1.0f; }
MG_INLINE float elu_slope(float z) { return z > 0.0f ? 1.0f : exponential(z); }

// What a stage keeps between its forward and its backward, all [block][pixel]...
template <typename T>
struct Kept {
  T* h;            // [16][depth]: h_l, then dE/dz_l in its place
  T* z;            // [16][depth]: with batch statistics or a curved activation
  uint16_t* mask;  // [strip][16]: the sign of what entered a piecewise linear activation
  float* sums;     // [2][strips * 16]: a pixel's share of the batch's statistics
  float* scale;    // [6][strips * 16]: gamma/std, beta, mean, 1/std; then mean(g), mean(g zh)
  int depth, strips;
};

constexpr int kMaxStages = 32;

template <typename T>
struct Engine {
  const ConvChainParams& p;
  int blocks, threads;
  // This thread's blocks in every pass, so that they stay in its cache; or all threads share out all blocks.
  bool own;
  int first_block, last_block;
  float* x;       // [block][element][16]
  float* dx;      // the same; where the gradient is asked for or a row is not whole quads
  uint8_t* mask;  // the same
  uint64_t* ids;  // [block][16]
  Kept<T> kept[kMaxStages];

  int elements() const { return p.channels * p.pixels; }
  bool fused() const { return !p.gradient && p.row % kEdgePixels == 0; }
  int valid(int block) const { return static_cast<int>(smaller(16, p.samples - 16LL * block)); }

  // Lays the buffers out from `base` on; returns the bytes they take.
  int64_t lay_out(char* base) {
    int64_t used = 0;
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<decltype(&*pointer)>(base + used);
      used += (count * static_cast<int64_t>(sizeof(*pointer)) + kAlign - 1) / kAlign * kAlign;
    };
    const int64_t state = static_cast<int64_t>(blocks) * elements() * 16;
    take(x, state);
    take(dx, fused() ? 0 : state);
    take(mask, p.mask ? state : 0);
    take(ids, static_cast<int64_t>(blocks) * 16);
    for (int l = 0; l < p.stages; ++l) {
      const ConvStage& stage = p.stage[l];
      Kept<T>& k = kept[l];
      const bool curved = stage.activation == Activation::kSilu || stage.activation == Activation::kElu;
      k.depth = padded<T>(stage.out_channels);
      k.strips = strips_of(stage.out_channels);
      const int64_t pixels = static_cast<int64_t>(blocks) * stage.out_pixels;
      take(k.h, pixels * 16 * k.depth);
      take(k.z, stage.gamma || curved ? pixels * 16 * k.depth : 0);
      take(k.mask, stage.activation == Activation::kLeaky ? pixels * 16 * k.strips : 0);
      take(k.sums, stage.gamma ? pixels * 2 * k.strips * 16 : 0);
      take(k.scale, stage.gamma ? 6 * k.strips * 16 : 0);
    }
    return used;
  }

  // ---- the sharing out of a pass ----

  // body(block[], output[], base[], items, taps, strip, strips) for every pair of items (an output of a block) that
  // read alike, and every pair of strips.
  template <typename Body>
  void sweep(const Windows& w, int all_strips, int64_t item_bytes, int64_t weight_bytes, const Body& body) {
    const int pairs = (all_strips + kStrips - 1) / kStrips, mine = last_block - first_block;
    const int64_t total = static_cast<int64_t>(w.outputs) * mine;
    int64_t chunk = larger(2, chunk_bytes() / larger(1, item_bytes));
    if (!own) chunk = smaller(chunk, larger(2, total * pairs / (32 * threads)));
    chunk += chunk & 1;
    int64_t chunks = 0;
    for (int c = 0; c < w.classes; ++c) {
      const int64_t items = static_cast<int64_t>(w.first_output[c + 1] - w.first_output[c]) * mine;
      chunks += (items + chunk - 1) / chunk;
    }
    // Either chunks of inputs stay put and all weights pass by each, or pairs of strips do and all inputs pass by.
    const int64_t inputs = total * item_bytes;
    const bool strips_outside = weight_bytes + inputs * pairs < inputs + weight_bytes * chunks;
    const auto run_task = [&](int64_t task) {
      int64_t index = strips_outside ? task % chunks : task / pairs;
      const int pair = static_cast<int>(strips_outside ? task / chunks : task % pairs);
      int c = 0;
      int64_t pixels = 0, items = 0;
      for (;; ++c) {
        pixels = w.first_output[c + 1] - w.first_output[c];
        items = pixels * mine;
        const int64_t here = (items + chunk - 1) / chunk;
        if (index < here) break;
        index -= here;
      }
      const Taps taps{w.tap_pixel + w.first_tap[c], w.tap_weight + w.first_tap[c], w.first_tap[c + 1] - w.first_tap[c]};
      const int strip = pair * kStrips;
      const int strips = all_strips - strip < kStrips ? all_strips - strip : kStrips;
      const int64_t last = smaller(items, (index + 1) * chunk);
      for (int64_t item = index * chunk; item < last; item += 2) {
        int block[2], output[2], base[2];
        const int count = item + 1 < last ? 2 : 1;
        for (int i = 0; i < count; ++i) {
          const int64_t at = w.first_output[c] + (item + i) % pixels;
          block[i] = first_block + static_cast<int>((item + i) / pixels);
          output[i] = w.output[at];
          base[i] = w.base[at];
        }
        body(block, output, base, count, taps, strip, strips);
      }
    };
    share(chunks * pairs, run_task);
  }

  // body(0) ... body(count - 1): all of them by a thread that owns its blocks, else shared out and waited for.
  template <typename Body>
  MG_METHOD void share(int64_t count, const Body& body) {
    if (own) {
      for (int64_t i = 0; i < count; ++i) body(i);
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) body(i);
    }
  }

  // Products of the outputs of `w` with input [block][pixel][16][depth], each tile handed to `finish`.
  template <typename Finish>
  void convolve(const Windows& w, const T* input, int in_pixels, int depth, const void* weights, int rows, int strips,
                const Finish& finish) {
    const Rows in{16LL * depth, 1, depth};
    const int64_t strip_size = 16LL * rows * depth;
    const T* packed = static_cast<const T*>(weights);
    const int64_t item_bytes = 16LL * depth * sizeof(T) * larger(1, in_pixels / larger(1, w.outputs));
    sweep(w, strips, item_bytes, strips * strip_size * sizeof(T),
          [&](const int* block, const int* output, const int* base, int count, const Taps& taps, int strip, int wide) {
            alignas(64) float out[2][16 * kTileWidth];
            const T* a[2];
            int rows[2];
            for (int i = 0; i < count; ++i) {
              rows[i] = valid(block[i]);
              a[i] = input + (static_cast<int64_t>(block[i]) * in_pixels + base[i]) * in.pixel;
            }
            tiles(a, rows, count, in, taps, packed + strip * strip_size, strip_size, wide, out);
            for (int i = 0; i < count; ++i) {
              for (int s = 0; s < wide; ++s) finish(block[i], output[i], strip + s, out[i] + 16 * s);
            }
          });
  }

  // The first stage reads the state itself, in float32 always: pixels of 0-255 would lose half a unit in bfloat16.
  template <typename Finish>
  void convolve_state(const ConvStage& stage, const Finish& finish) {
    const Rows in{16, 16LL * stage.in_pixels, stage.in_channels};
    const int64_t strip_size = 16LL * stage.forward_rows * stage.in_channels;
    const float* packed = static_cast<const float*>(stage.forward_weights);
    const int64_t item_bytes = 64LL * stage.in_channels * larger(1, stage.in_pixels / stage.out_pixels);
    const int strips = strips_of(stage.out_channels);
    sweep(stage.forward, strips, item_bytes, strips * strip_size * 4,
          [&](const int* block, const int* output, const int* base, int count, const Taps& taps, int strip, int wide) {
            alignas(64) float out[2][16 * kTileWidth];
            const float* a[2];
            int rows[2];
            for (int i = 0; i < count; ++i) {
              rows[i] = valid(block[i]);
              a[i] = x + static_cast<int64_t>(block[i]) * elements() * 16 + 16LL * base[i];
            }
            float_tiles<true>(a, rows, count, in, taps, packed + strip * strip_size, strip_size, wide, out);
            for (int i = 0; i < count; ++i) {
              for (int s = 0; s < wide; ++s) finish(block[i], output[i], strip + s, out[i] + 16 * s);
            }
          });
  }

  // ---- what is done with a tile of 16 samples x 16 channels ----

  int64_t pixel_at(int l, int block, int pixel) const {
    return static_cast<int64_t>(block) * p.stage[l].out_pixels + pixel;
  }
  T* h_at(int l, int64_t pixel, int strip) const { return kept[l].h + pixel * 16 * kept[l].depth + 16 * strip; }
  T* z_at(int l, int64_t pixel, int strip) const { return kept[l].z + pixel * 16 * kept[l].depth + 16 * strip; }
  uint16_t* mask_at(int l, int64_t pixel, int strip) const {
    return kept[l].mask + (pixel * kept[l].strips + strip) * 16;
  }
  float* sums_at(int l, int64_t pixel, int which, int strip) const {
    return kept[l].sums + ((pixel * 2 + which) * kept[l].strips + strip) * 16;
  }
  float* scale_at(int l, int which, int strip) const { return kept[l].scale + (which * kept[l].strips + strip) * 16; }

  // a(z), and for a piecewise linear a the sign that its slope will need.
  MG_METHOD F16 activate(const ConvStage& stage, F16 z, uint16_t* sign) {
    switch (stage.activation) {
      case Activation::kNone:
        return z;
      case Activation::kLeaky:
        *sign = positive(z);
        return select(*sign, z, stage.slope == 0.0f ? all(0.0f) : z * all(stage.slope));
      case Activation::kSilu:
        return each(z, silu);
      default:
        return each(z, elu);
    }
  }

  // g a'(z): by the sign that was kept, or from z.
  MG_METHOD F16 times_slope(const ConvStage& stage, F16 g, uint16_t sign, F16 z) {
    switch (stage.activation) {
      case Activation::kNone:
        return g;
      case Activation::kLeaky:
        return select(sign, g, stage.slope == 0.0f ? all(0.0f) : g * all(stage.slope));
      case Activation::kSilu:
        return g * each(z, silu_slope);
      default:
        return g * each(z, elu_slope);
    }
  }

  // sums <- the mean, and the squared distances from it, of rows 0 ... count - 1.
  static void statistics(const float* tile, int count, float* mean_at, float* square_at) {
    F16 sum = all(0.0f), square = all(0.0f);
    for (int n = 0; n < count; ++n) sum = sum + load(tile + n * kTileWidth);
    const F16 mean = sum * all(1.0f / static_cast<float>(count));
    for (int n = 0; n < count; ++n) {
      const F16 d = load(tile + n * kTileWidth) - mean;
      square = multiply_add(d, d, square);
    }
    store(mean_at, mean);
    store(square_at, square);
  }

  void finish_forward(int l, int block, int pixel, int strip, float* tile) {
    const ConvStage& stage = p.stage[l];
    const Kept<T>& k = kept[l];
    const int64_t at = pixel_at(l, block, pixel);
    if (stage.gamma) {
      T* z = z_at(l, at, strip);
      for (int n = 0; n < 16; ++n) {
        store(z + n * k.depth, load(tile + n * kTileWidth));
        // Statistics of what is kept: normalised values then have mean 0, whatever it was rounded to.
        store(tile + n * kTileWidth, load(z + n * k.depth));
      }
      statistics(tile, valid(block), sums_at(l, at, 0, strip), sums_at(l, at, 1, strip));
      return;
    }
    const bool top = l + 1 == p.stages;
    const F16 bias = load(stage.bias + 16 * strip);
    const F16 head = top ? load(p.head + (static_cast<int64_t>(pixel) * k.strips + strip) * 16) : bias;
    T* h = h_at(l, at, strip);
    for (int n = 0; n < 16; ++n) {
      const F16 z = load(tile + n * kTileWidth) + bias;
      uint16_t sign = 0;
      const F16 out = activate(stage, z, &sign);
      if (top) {
        store(h + n * k.depth, times_slope(stage, head, sign, z));
        continue;
      }
      if (stage.activation == Activation::kLeaky) mask_at(l, at, strip)[n] = sign;
      if (stage.activation >= Activation::kSilu) store(z_at(l, at, strip) + n * k.depth, z);
      store(h + n * k.depth, out);
    }
  }

  // dE/dh_l a'(z_l), and with batch statistics a pixel's share of sum(g) and sum(g zh).
  void finish_backward(int l, int block, int pixel, int strip, float* tile) {
    const ConvStage& stage = p.stage[l];
    const Kept<T>& k = kept[l];
    const int64_t at = pixel_at(l, block, pixel);
    T* h = h_at(l, at, strip);
    const T* z = z_at(l, at, strip);  // read where there is one
    const uint16_t* sign = stage.activation == Activation::kLeaky ? mask_at(l, at, strip) : nullptr;
    const bool needs_z = stage.gamma || stage.activation >= Activation::kSilu;
    const Affine norm = affine(l, strip);
    F16 sum = all(0.0f), product = all(0.0f);
    const int count = valid(block);
    for (int n = 0; n < 16; ++n) {
      const F16 raw = needs_z ? load(z + n * k.depth) : all(0.0f);
      const F16 entered = stage.gamma ? norm.of(raw) : raw;
      const F16 g = times_slope(stage, load(tile + n * kTileWidth), sign ? sign[n] : 0, entered);
      store(h + n * k.depth, g);
      if (stage.gamma && n < count) {
        const F16 held = load(h + n * k.depth);
        sum = sum + held;
        product = multiply_add(held, (raw - norm.mean) * norm.inverse_std, product);
      }
    }
    if (!stage.gamma) return;
    store(sums_at(l, at, 0, strip), sum);
    store(sums_at(l, at, 1, strip), product);
  }

  // ---- batch statistics ----

  struct Affine {
    F16 scale, beta, mean, inverse_std;
    // The mean goes first: z and it may be far larger than their difference.
    MG_METHOD F16 of(F16 z) const { return multiply_add(z - mean, scale, beta); }
  };
  MG_METHOD Affine affine(int l, int strip) {
    if (!p.stage[l].gamma) return {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
    return {load(scale_at(l, 0, strip)), load(scale_at(l, 1, strip)), load(scale_at(l, 2, strip)),
            load(scale_at(l, 3, strip))};
  }

  // Means and variances of the batch from the pixels' shares, in double: one order, whatever the threads.
  void reduce_statistics(int l) {
    const ConvStage& stage = p.stage[l];
    const double total = static_cast<double>(p.samples) * stage.out_pixels;
#pragma omp barrier
#pragma omp for schedule(static)
    for (int strip = 0; strip < kept[l].strips; ++strip) {
      double mean[16] = {}, square[16] = {};
      each_pixel(l, [&](int64_t at, int count) {
        const float* m = sums_at(l, at, 0, strip);
        for (int i = 0; i < 16; ++i) mean[i] += static_cast<double>(m[i]) * count;
      });
      for (int i = 0; i < 16; ++i) mean[i] /= total;
      each_pixel(l, [&](int64_t at, int count) {
        const float *m = sums_at(l, at, 0, strip), *s = sums_at(l, at, 1, strip);
        for (int i = 0; i < 16; ++i) {
          const double d = m[i] - mean[i];
          square[i] += s[i] + count * d * d;
        }
      });
      for (int i = 0; i < 16; ++i) {
        const int c = 16 * strip + i;
        const bool real = c < stage.out_channels;
        const double inverse_std =
            real ? 1.0 / __builtin_sqrt(square[i] / total + static_cast<double>(stage.eps)) : 0.0;
        const double scale = real ? stage.gamma[c] * inverse_std : 0.0;
        scale_at(l, 0, strip)[i] = static_cast<float>(scale);
        scale_at(l, 1, strip)[i] = real ? stage.beta[c] : 0.0f;
        scale_at(l, 2, strip)[i] = static_cast<float>(mean[i]);
        scale_at(l, 3, strip)[i] = static_cast<float>(inverse_std);
      }
    }
  }

  void reduce_gradient(int l) {
    const double total = static_cast<double>(p.samples) * p.stage[l].out_pixels;
#pragma omp barrier
#pragma omp for schedule(static)
    for (int strip = 0; strip < kept[l].strips; ++strip) {
      for (int which = 0; which < 2; ++which) {
        double sum[16] = {};
        each_pixel(l, [&](int64_t at, int) {
          const float* share = sums_at(l, at, which, strip);
          for (int i = 0; i < 16; ++i) sum[i] += share[i];
        });
        for (int i = 0; i < 16; ++i) scale_at(l, 4 + which, strip)[i] = static_cast<float>(sum[i] / total);
      }
    }
  }

  template <typename Body>
  MG_METHOD void each_pixel(int l, const Body& body) {
    for (int block = 0; block < blocks; ++block) {
      for (int pixel = 0; pixel < p.stage[l].out_pixels; ++pixel) body(pixel_at(l, block, pixel), valid(block));
    }
  }

  // body(block, pixel, strip) for every 16 x 16 tile of a stage's map, shared out.
  template <typename Body>
  MG_METHOD void each_tile(int l, const Body& body) {
    const int64_t pixels = p.stage[l].out_pixels, first = first_block * pixels;
    share_evenly((last_block - first_block) * pixels, [&](int64_t i) {
      const int64_t at = first + i;
      for (int strip = 0; strip < kept[l].strips; ++strip) {
        body(static_cast<int>(at / pixels), static_cast<int>(at % pixels), strip);
      }
    });
  }

  // As `share`, for small pieces of equal work.
  template <typename Body>
  MG_METHOD void share_evenly(int64_t count, const Body& body) {
    if (own) {
      for (int64_t i = 0; i < count; ++i) body(i);
    } else {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) body(i);
    }
  }

  // h <- a(gamma zh + beta); at the top, dE/dh_L a'(gamma zh + beta) with its share of the sums.
  void normalise(int l) {
    const ConvStage& stage = p.stage[l];
    const Kept<T>& k = kept[l];
    if (l + 1 == p.stages) {
      each_tile(l, [&](int block, int pixel, int strip) {
        alignas(64) float tile[16 * kTileWidth];
        const int64_t at = pixel_at(l, block, pixel);
        const Affine norm = affine(l, strip);
        const F16 head = load(p.head + (static_cast<int64_t>(pixel) * k.strips + strip) * 16);
        for (int n = 0; n < 16; ++n) {
          const F16 y = norm.of(load(z_at(l, at, strip) + n * k.depth));
          if (stage.activation == Activation::kLeaky) mask_at(l, at, strip)[n] = positive(y);
          store(tile + n * kTileWidth, head);
        }
        finish_backward(l, block, pixel, strip, tile);
      });
      return;
    }
    each_tile(l, [&](int block, int pixel, int strip) {
      const int64_t at = pixel_at(l, block, pixel);
      const Affine norm = affine(l, strip);
      const T* z = z_at(l, at, strip);
      T* h = h_at(l, at, strip);
      uint16_t* sign = mask_at(l, at, strip);
      for (int n = 0; n < 16; ++n) {
        const F16 y = norm.of(load(z + n * k.depth));
        uint16_t here = 0;
        store(h + n * k.depth, activate(stage, y, &here));
        if (stage.activation == Activation::kLeaky) sign[n] = here;
      }
    });
  }

  // g <- gamma / std (g - mean(g) - zh mean(g zh))
  void centre(int l) {
    const Kept<T>& k = kept[l];
    each_tile(l, [&](int block, int pixel, int strip) {
      const int64_t at = pixel_at(l, block, pixel);
      const Affine norm = affine(l, strip);
      const F16 mean = load(scale_at(l, 4, strip)), product = load(scale_at(l, 5, strip));
      const T* z = z_at(l, at, strip);
      T* h = h_at(l, at, strip);
      for (int n = 0; n < 16; ++n) {
        const F16 unit = (load(z + n * k.depth) - norm.mean) * norm.inverse_std;
        store(h + n * k.depth, (load(h + n * k.depth) - mean - unit * product) * norm.scale);
      }
    });
  }

  // ---- the state ----

  // Four neighbouring elements, a quad of noise, of a block of samples; slope[j]: dE/dx of element 4 quad + j.
  void update_quad(int block, int64_t quad, int count, const float (*slope)[16], const SampleKey& key) {
    alignas(64) uint32_t words[4][16];
    alignas(64) float normal[4][16] = {};
    if (p.update.noise_std != 0.0f) {
      philox_samples(key, static_cast<uint32_t>(quad), ids + 16 * block, words);
#pragma omp simd
      for (int i = 0; i < 16; ++i) {
        const Quad q = normals_of({words[0][i], words[1][i], words[2][i], words[3][i]});
        normal[0][i] = q.v0, normal[1][i] = q.v1, normal[2][i] = q.v2, normal[3][i] = q.v3;
      }
      if (!key.valid) {
        for (int i = 0; i < 64; ++i) normal[i / 16][i % 16] = __builtin_nanf("");
      }
    }
    const LangevinStepCoefficients k = p.update;
    for (int j = 0; j < count; ++j) {
      const int64_t at = (static_cast<int64_t>(block) * elements() + 4 * quad + j) * 16;
      float* __restrict__ here = x + at;
      if (p.mask) {
        const uint8_t* held = mask + at;
#pragma omp simd
        for (int i = 0; i < 16; ++i) {
          const float value = langevin_step_update(k, here[i], slope[j][i], normal[j][i]);
          here[i] = held[i] ? value : here[i];
        }
      } else {
#pragma omp simd
        for (int i = 0; i < 16; ++i) here[i] = langevin_step_update(k, here[i], slope[j][i], normal[j][i]);
      }
    }
  }

  // dE/dx from dE/dz_0, and with it the update: the outputs are runs of four pixels, a strip four channels of each.
  void edge(const SampleKey& key) {
    const ConvStage& stage = p.stage[0];
    const int runs = (p.row + kEdgePixels - 1) / kEdgePixels;  // a row of pixels
    const int strips = (p.channels + kEdgeChannels - 1) / kEdgeChannels;
    convolve(stage.backward, kept[0].h, stage.out_pixels, kept[0].depth, stage.backward_weights, stage.backward_rows,
             strips, [&](int block, int run, int strip, float* tile) {
               alignas(64) float slope[16][16];
               transpose(tile, kTileWidth, slope);
               const int first = run / runs * p.row + run % runs * kEdgePixels;
               for (int c = 0; c < kEdgeChannels; ++c) {
                 const int channel = strip * kEdgeChannels + c;
                 if (channel >= p.channels) break;
                 const int64_t element = static_cast<int64_t>(channel) * p.pixels + first;
                 if (fused()) {
                   update_quad(block, element / 4, 4, slope + kEdgePixels * c, key);
                   continue;
                 }
                 float* out = dx + (static_cast<int64_t>(block) * elements() + element) * 16;
                 const int count = p.row - run % runs * kEdgePixels;
                 for (int j = 0; j < count && j < kEdgePixels; ++j)
                   store(out + 16 * j, load(slope[kEdgePixels * c + j]));
               }
             });
    if (fused() || p.gradient) return;
    const int64_t quads = (elements() + 3) / 4;
    share_evenly((last_block - first_block) * quads, [&](int64_t unit) {
      const int block = first_block + static_cast<int>(unit / quads);
      const int64_t quad = unit % quads;
      const float* slope = dx + (static_cast<int64_t>(block) * elements() + 4 * quad) * 16;
      update_quad(block, quad, static_cast<int>(smaller(4, elements() - 4 * quad)),
                  reinterpret_cast<const float (*)[16]>(slope), key);
    });
  }

  void gradient(const SampleKey& key) {
    for (int l = 0; l < p.stages; ++l) {
      const ConvStage& stage = p.stage[l];
      const auto finish = [&](int block, int pixel, int strip, float* tile) {
        finish_forward(l, block, pixel, strip, tile);
      };
      if (l == 0) {
        convolve_state(stage, finish);
      } else {
        convolve(stage.forward, kept[l - 1].h, stage.in_pixels, kept[l - 1].depth, stage.forward_weights,
                 stage.forward_rows, kept[l].strips, finish);
      }
      if (!stage.gamma) continue;
      reduce_statistics(l);
      normalise(l);
    }
    for (int l = p.stages - 1; l >= 0; --l) {
      const ConvStage& stage = p.stage[l];
      if (stage.gamma) {
        reduce_gradient(l);
        centre(l);
      }
      if (l == 0) break;
      convolve(stage.backward, kept[l].h, stage.out_pixels, kept[l].depth, stage.backward_weights, stage.backward_rows,
               kept[l - 1].strips, [&](int block, int pixel, int strip, float* tile) {
                 finish_backward(l - 1, block, pixel, strip, tile);
               });
    }
    edge(key);
  }

  // (samples, elements) <-> [block][element][16]. Lanes past the last sample repeat it: they stay as finite as it is.
  void read_state() {
    share_evenly(static_cast<int64_t>(last_block - first_block) * elements(), [&](int64_t i) {
      const int64_t unit = static_cast<int64_t>(first_block) * elements() + i;
      const int64_t block = unit / elements(), element = unit % elements();
      for (int lane = 0; lane < 16; ++lane) {
        const int64_t sample = smaller(16 * block + lane, p.samples - 1);
        x[unit * 16 + lane] = p.x[sample * elements() + element];
        if (p.mask) mask[unit * 16 + lane] = p.mask[sample * elements() + element];
      }
    });
    share_evenly(16LL * (last_block - first_block), [&](int64_t i) {
      const int64_t lane = 16LL * first_block + i;
      ids[lane] = sample_key(p.counters, smaller(lane, p.samples - 1)).sample;
    });
  }

  void write(const float* from, float* to) {
    const int64_t first = 16LL * first_block;
    share_evenly(smaller(16LL * last_block, p.samples) - first, [&](int64_t i) {
      const int64_t sample = first + i;
      const float* in = from + sample / 16 * elements() * 16 + sample % 16;
      for (int64_t element = 0; element < elements(); ++element) to[sample * elements() + element] = in[element * 16];
    });
  }

  // Channels that only fill up a strip or a tile are read as inputs and must be zero.
  void clear_padding() {
    for (int l = 0; l < p.stages; ++l) {
      if (kept[l].depth == p.stage[l].out_channels) continue;
      const int64_t size = 16LL * kept[l].depth, first = static_cast<int64_t>(first_block) * p.stage[l].out_pixels;
      share_evenly(static_cast<int64_t>(last_block - first_block) * p.stage[l].out_pixels, [&](int64_t i) {
        __builtin_memset(static_cast<void*>(kept[l].h + (first + i) * size), 0, size * sizeof(T));
      });
    }
  }

  void run() {
    SampleKey key = sample_key(p.counters, 0);
    key.valid &= sample_key(p.counters, p.samples - 1).valid;
    const int64_t first_step = p.counters.step_at ? *p.counters.step_at : p.counters.step;
    begin_tiles();
    read_state();
    clear_padding();
    if (p.gradient) {
      gradient(key);
      write(dx, p.gradient);
    } else {
      for (int64_t k = 0; k < p.steps; ++k) {
        const int64_t step = first_step + k;
        key.step = static_cast<uint32_t>(step);
        key.valid &= (static_cast<uint64_t>(step) >> 32) == 0;
        gradient(key);
      }
      write(x, p.x);
    }
    end_tiles();
  }
};

// An engine that shares out all passes, with its buffers not laid out yet.
template <typename T>
Engine<T> engine(const ConvChainParams& p, int threads) {
  const int blocks = static_cast<int>((p.samples + 15) / 16);
  return {p, blocks, threads, false, 0, blocks, nullptr, nullptr, nullptr, nullptr, {}};
}

enum class Sharing {
  kPasses,  // all threads work on every pass together
  kBlocks,  // they meet for the batch's statistics alone, each with blocks of its own
  kChains,  // nobody waits: each runs the whole chain of a few blocks, and then of the next
};
constexpr int64_t kChainBlocks = 2;

struct Plan {
  Sharing sharing;
  int threads;
  int64_t blocks;  // of a chain, where those are shared out
};

// Below this many products a thread and step, waiting for each other costs more than a further thread saves.
constexpr double kGrainProducts = 2e6;

Plan plan_of(const ConvChainParams& p, int threads) {
  double products = 0;
  bool coupled = false;
  for (int l = 0; l < p.stages; ++l) {
    const ConvStage& s = p.stage[l];
    products += 2.0 * s.out_pixels * s.forward_rows * s.in_channels * s.out_channels;
    coupled |= s.gamma != nullptr;
  }
  const int64_t blocks = (p.samples + 15) / 16;
  if (!coupled && blocks >= threads) {
    return {Sharing::kChains, threads, smaller(kChainBlocks, (blocks + threads - 1) / threads)};
  }
  const double useful = 1 + products * static_cast<double>(p.samples) / kGrainProducts;
  if (useful < threads) threads = static_cast<int>(useful);
  // What a thread has more of than another, all others wait for.
  const bool even = blocks % threads == 0 || blocks >= 3 * threads;
  return {even ? Sharing::kBlocks : Sharing::kPasses, threads, 0};
}

// The same call for `samples` samples from `first` on.
ConvChainParams part(const ConvChainParams& p, int64_t first, int64_t samples) {
  ConvChainParams some = p;
  const int64_t offset = first * p.channels * p.pixels;
  some.samples = samples;
  some.x = p.x + offset;
  if (p.gradient) some.gradient = p.gradient + offset;
  if (p.mask) some.mask = p.mask + offset;
  Counters& c = some.counters;
  if (c.samples_at && !c.one_base) {
    c.samples_at += first;
  } else {
    c.first_sample = first + (c.samples_at ? *c.samples_at : c.first_sample);
    c.samples_at = nullptr;
  }
  return some;
}

template <typename T>
int64_t workspace(const ConvChainParams& p, int threads) {
  const Plan plan = plan_of(p, threads);
  if (plan.sharing != Sharing::kChains) return engine<T>(p, 1).lay_out(nullptr);
  return engine<T>(part(p, 0, smaller(p.samples, 16 * plan.blocks)), 1).lay_out(nullptr) * plan.threads;
}

template <typename T>
void run(const ConvChainParams& p, int threads) {
  const Plan plan = plan_of(p, threads);
  char* const base = static_cast<char*>(p.workspace);
  if (plan.sharing != Sharing::kChains) {
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
    {
      Engine<T> engine_here = engine<T>(p, plan.threads);
      engine_here.lay_out(base);
      if (plan.sharing == Sharing::kBlocks) {
        const int64_t blocks = engine_here.blocks, me = omp_get_thread_num(), all = omp_get_num_threads();
        engine_here.own = true;
        engine_here.first_block = static_cast<int>(blocks * me / all);
        engine_here.last_block = static_cast<int>(blocks * (me + 1) / all);
      }
      engine_here.run();
    }
    return;
  }
  const int64_t size = 16 * plan.blocks, each = workspace<T>(p, threads) / plan.threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan.threads)
  for (int64_t first = 0; first < p.samples; first += size) {
    const ConvChainParams some = part(p, first, smaller(size, p.samples - first));
    Engine<T> engine_here = engine<T>(some, 1);
    engine_here.lay_out(base + omp_get_thread_num() * each);
    engine_here.own = true;
    engine_here.run();
  }
}

}  // namespace

int64_t conv_chain_workspace(const ConvChainParams& p, int threads) {
#if defined(__AVX512BF16__)
  if (p.bfloat) return workspace<Bf16>(p, threads);
#endif
  return workspace<float>(p, threads);
}

void conv_chain_cpu(const ConvChainParams& p, int threads) {
#if defined(__AVX512BF16__)
  if (p.bfloat) return run<Bf16>(p, threads);
#endif
  run<float>(p, threads);
}

}  // namespace mgebm::MGEBM_ISA
