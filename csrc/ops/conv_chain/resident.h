// conv_chain on a GPU, resident: one launch makes all K steps of a net whose float16 weights fit into shared memory, or
// the cascade of several such nets, each of which starts from the enlarged result of the one before.
//
// A block holds `samples` chains. In shared memory for a whole chain: the weights of all stages, once, in the order of
// [tap][output][input]; the state x in float32, and as the sum of two float16 numbers; one float16 map a stage. In the
// forward pass a map holds h_l; in the backward pass dE/dz_l overwrites h_l, number by number, by the thread that reads
// the slope of its activation from the sign of h_l. Only x is written back to memory.
//
//   forward l    z = W h_(l-1) + b;  map l <- a(z);  at the top  map <- head a'(z)
//   backward l   map l-1 <- (W' map l) a'(z_(l-1))                                            l = top ... 1
//
// and where a stage l + 1 has a shortcut, a stage l of its own in the list, from an earlier stage s whose z is kept:
//
//   forward l    z of l+1 <- S z_s,  which forward l+1 adds
//   backward l   map s <- S' map l+1,  to which the stage that reads h_s adds its own
//
//   edge         dx <- W' map 0
//   update       x <- langevin_step_update(x, dx / scale, normal)
//
// The matrix products are in resident_product.h.
#pragma once

#include "ops/conv_chain/resident_product.h"

namespace mgebm {

MG_BODY float exponential_of(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float n = static_cast<float>(static_cast<int32_t>(x * 1.44269504f + (x < 0.0f ? -0.5f : 0.5f)));
  const float r = fused(n, 2.12194440e-4f, fused(-n, 0.693359375f, x));
  float p = 1.98756915e-4f;
  p = fused(p, r, 1.39819995e-3f);
  p = fused(p, r, 8.33345192e-3f);
  p = fused(p, r, 4.16657955e-2f);
  p = fused(p, r, 1.66666655e-1f);
  p = fused(p, r, 5.00000012e-1f);
  p = fused(p * r, r, r + 1.0f);
  return p * as_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

MG_BODY bool is_finite(float value) { return (as_bits(value) & 0x7F800000u) != 0x7F800000u; }

// a(z). For a piecewise linear a (none: slope 1) the sign bit of the result marks z <= 0, also of a zero: the backward
// pass reads the slope from it.
template <bool kCurved>
MG_BODY float activate(const ResidentStage& stage, float z) {
  if constexpr (!kCurved) return z > 0.0f ? z : as_float(as_bits(z * stage.slope) | 0x80000000u);
  if (stage.activation == Activation::kElu) return z > 0.0f ? z : exponential_of(z) - 1.0f;
  return z / (1.0f + exponential_of(-z));
}

// a'(z)
template <bool kCurved>
MG_BODY float slope_of(const ResidentStage& stage, float z) {
  if constexpr (!kCurved) return z > 0.0f ? 1.0f : stage.slope;
  if (stage.activation == Activation::kElu) return z > 0.0f ? 1.0f : exponential_of(z);
  const float s = 1.0f / (1.0f + exponential_of(-z));
  return s * fused(z, 1.0f - s, 1.0f);
}

MG_BODY bool curved(const ResidentStage& stage) {
  return stage.activation == Activation::kSilu || stage.activation == Activation::kElu;
}

template <class Cta>
class Resident {
 public:
  using Warp = typename Cta::Warp;
  using Product = ResidentProduct<Warp>;

  MG_BODY Resident(Cta& cta, const ResidentParams& params) : cta_(cta), p_(params) {
    begin_ = cta.index() * params.share;
    end_ = begin_ + params.share < params.samples ? begin_ + params.share : params.samples;
  }

  // Every block takes its samples through all nets: a net starts from what its own block wrote.
  MG_BODY void run() {
    for (int i = 0; i < p_.nets.count; ++i) {
      const ResidentNet& net = p_.nets.at[i];
      load_image(net);
      for (int64_t first = begin_; first < end_; first += net.samples) {
        load_state(net, first);
        const int64_t steps = net.gradient ? 1 : net.steps;
        for (int64_t k = 0; k < steps; ++k) {
          gradient(net);
          if (!net.gradient) update(net, first, k);
        }
        if (net.gradient) {
          write(net, first, net.dx, *number(net, net.unscale), net.gradient);
        } else {
          write(net, first, net.x, 1.0f, net.out);
        }
      }
    }
  }

 private:
  MG_BODY static const float* number(const ResidentNet& net, int32_t at) {
    return reinterpret_cast<const float*>(net.memory + at);
  }
  // A sample for what a block has no sample for: the same one once more, which is not written.
  MG_BODY int64_t real_sample(int64_t sample) const { return sample < end_ ? sample : end_ - 1; }

  // body(i) for i = 0 ... count - 1, each by one lane of some warp.
  template <typename Body>
  MG_BODY void spread(int count, const Body& body) {
    cta_.phase([&](const Warp& warp) {
      warp.each([&](int lane) {
        for (int i = warp.index() * kLanes + lane; i < count; i += cta_.warps() * kLanes) body(warp, i);
      });
    });
  }

  struct Chunk {
    uint32_t w[4];
  };

  MG_BODY void load_image(const ResidentNet& net) {
    struct alignas(16) Aligned : Chunk {};
    const Aligned* from = reinterpret_cast<const Aligned*>(net.memory);
    spread(net.image_bytes / 16, [&](const Warp& warp, int i) { warp.store(static_cast<uint32_t>(16 * i), from[i]); });
  }

  // The pixel of net.from that pixel `pixel` of x starts as: the same one, or the coarser one it is replicated from.
  MG_BODY static int source_pixel(const ResidentNet& net, int pixel) {
    const Extent& size = net.size;
    const Extent& by = net.factor;
    const int64_t column = pixel % size.width / by.width, row = pixel / size.width % size.height / by.height;
    const int64_t plane = pixel / (size.width * size.height) / by.depth;
    const int64_t source = (plane * (size.height / by.height) + row) * (size.width / by.width) + column;
    return static_cast<int>(source);
  }

  MG_BODY void load_state(const ResidentNet& net, int64_t first) {
    const int elements = net.channels * net.pixels;
    const int source_pixels = static_cast<int>(net.pixels / (net.factor.depth * net.factor.height * net.factor.width));
    const ResidentStage& stage = net.stages.at[0];
    // Channels that pad a chunk are multiplied by zero weights: they must be finite, as 0 times NaN is NaN.
    spread(net.samples * net.pixels * stage.in_chunks, [&](const Warp& warp, int i) {
      struct alignas(16) Aligned : Chunk {};
      warp.store(chunk_at(net.x_map, i), Aligned{});
    });
    spread(net.samples * elements, [&](const Warp& warp, int i) {
      const int s = i / elements, element = i % elements, channel = element / net.pixels, pixel = element % net.pixels;
      const int64_t plane = real_sample(first + s) * net.channels + channel;
      store_state(warp, net, s, channel, pixel, net.from[plane * source_pixels + source_pixel(net, pixel)]);
    });
  }

  // x, and x = high + low to the first convolution: channels `channel` and net.channels + `channel` of its map.
  MG_BODY static void store_state(const Warp& warp, const ResidentNet& net, int s, int channel, int pixel, float x) {
    const int chunks = net.stages.at[0].in_chunks;
    warp.store(static_cast<uint32_t>(net.x + 4 * ((s * net.channels + channel) * net.pixels + pixel)), x);
    const uint16_t high = static_cast<uint16_t>(pack(x, 0.0f));
    const uint16_t low = static_cast<uint16_t>(pack(x - unpack(high), 0.0f));
    const int start = (s * net.pixels + pixel) * chunks, other = channel + net.channels;
    warp.store(chunk_at(net.x_map, start + channel / 8) + 2u * static_cast<uint32_t>(channel % 8), high);
    warp.store(chunk_at(net.x_map, start + other / 8) + 2u * static_cast<uint32_t>(other % 8), low);
  }

  MG_BODY void write(const ResidentNet& net, int64_t first, int32_t at, float factor, float* to) {
    const int elements = net.channels * net.pixels;
    spread(net.samples * elements, [&](const Warp& warp, int i) {
      if (first + i / elements >= end_) return;
      to[first * elements + i] = factor * warp.template load<float>(static_cast<uint32_t>(at + 4 * i));
    });
  }

  MG_BODY void gradient(const ResidentNet& net) {
    for (int l = 0; l < net.stages.count; ++l) forward(net, l);
    for (int l = net.stages.count - 1; l > 0; --l) backward(net, l);
    const int pixels = net.pixels, elements = net.channels * pixels;
    products<true, 1>(net, 0, (net.channels + 7) / 8, [&](const Warp& warp, const auto& each_pair) {
      each_pair([&](int s, int pixel, int column, float v0, float v1) {
        const uint32_t at = static_cast<uint32_t>(net.dx + 4 * (s * elements + column * pixels + pixel));
        if (column < net.channels) warp.store(at, v0);
        if (column + 1 < net.channels) warp.store(at + 4u * static_cast<uint32_t>(pixels), v1);
      });
    });
  }

  // The address of two neighbouring channels in a stage's map, or in the z that is kept beside it.
  MG_BODY static uint32_t pair_at(const ResidentStage& stage, int32_t map, int s, int pixel, int column) {
    return chunk_at(map, (s * stage.out_pixels + pixel) * stage.out_chunks + column / 8) +
           2u * static_cast<uint32_t>(column % 8);
  }

  MG_BODY void forward(const ResidentNet& net, int l) {
    const ResidentStage& stage = net.stages.at[l];
    products<false, 2>(net, l, stage.out_chunks, [&](const Warp& warp, const auto& each_pair) {
      if (stage.shortcut) {
        store_pairs(stage, stage.z, warp, each_pair);
      } else if (curved(stage)) {
        finish_forward<true>(net, l, warp, each_pair);
      } else {
        finish_forward<false>(net, l, warp, each_pair);
      }
    });
  }

  // Adds to v0 and v1 the two numbers at `at`.
  MG_BODY static void add_pair(const Warp& warp, uint32_t at, float& v0, float& v1) {
    const uint32_t pair = warp.template load<uint32_t>(at);
    v0 += unpack(static_cast<uint16_t>(pair)), v1 += unpack(static_cast<uint16_t>(pair >> 16));
  }

  template <bool kCurved, typename EachPair>
  MG_BODY void finish_forward(const ResidentNet& net, int l, const Warp& warp, const EachPair& each_pair) {
    const ResidentStage& stage = net.stages.at[l];
    const auto complete = [&](int s, int pixel, int column, float& v0, float& v1) {
      v0 += warp.template load<float>(static_cast<uint32_t>(stage.bias + 4 * column));
      v1 += warp.template load<float>(static_cast<uint32_t>(stage.bias + 4 * column + 4));
      if (stage.adds) add_pair(warp, pair_at(stage, stage.z, s, pixel, column), v0, v1);
    };
    if (l + 1 == net.stages.count) {
      const float* head = number(net, net.head);
      each_pair([&](int s, int pixel, int column, float z0, float z1) {
        const float* d = head + pixel * 8 * stage.out_chunks + column;
        complete(s, pixel, column, z0, z1);
        // An overflow of the forward pass must reach dE/dx whatever the slope: z - z is NaN for inf and NaN, else 0.
        const float g0 = fused(d[0], slope_of<kCurved>(stage, z0), z0 - z0);
        const float g1 = fused(d[1], slope_of<kCurved>(stage, z1), z1 - z1);
        warp.store(pair_at(stage, stage.map, s, pixel, column), pack(g0, g1));
      });
      return;
    }
    each_pair([&](int s, int pixel, int column, float z0, float z1) {
      complete(s, pixel, column, z0, z1);
      warp.store(pair_at(stage, stage.map, s, pixel, column),
                 pack(activate<kCurved>(stage, z0), activate<kCurved>(stage, z1)));
      if (stage.z >= 0) warp.store(pair_at(stage, stage.z, s, pixel, column), pack(z0, z1));
    });
  }

  template <typename EachPair>
  MG_BODY static void store_pairs(const ResidentStage& stage, int32_t map, const Warp& warp,
                                  const EachPair& each_pair) {
    each_pair([&](int s, int pixel, int column, float v0, float v1) {
      warp.store(pair_at(stage, map, s, pixel, column), pack(v0, v1));
    });
  }

  MG_BODY void backward(const ResidentNet& net, int l) {
    const ResidentStage& stage = net.stages.at[l];
    const ResidentStage& below = net.stages.at[stage.from];
    products<true, 2>(net, l, below.out_chunks, [&](const Warp& warp, const auto& each_pair) {
      if (stage.shortcut) {
        store_pairs(below, below.map, warp, each_pair);
      } else if (below.z >= 0) {
        each_pair([&](int s, int pixel, int column, float v0, float v1) {
          const uint32_t z = warp.template load<uint32_t>(pair_at(below, below.z, s, pixel, column));
          const float z0 = unpack(static_cast<uint16_t>(z)), z1 = unpack(static_cast<uint16_t>(z >> 16));
          v0 *= curved(below) ? slope_of<true>(below, z0) : slope_of<false>(below, z0);
          v1 *= curved(below) ? slope_of<true>(below, z1) : slope_of<false>(below, z1);
          const uint32_t at = pair_at(below, below.map, s, pixel, column);
          if (stage.adds_below) add_pair(warp, at, v0, v1);
          warp.store(at, pack(v0, v1));
        });
      } else {
        each_pair([&](int s, int pixel, int column, float v0, float v1) {
          const uint32_t at = pair_at(below, below.map, s, pixel, column);
          const uint32_t h = warp.template load<uint32_t>(at);
          warp.store(at, pack(h & 0x8000u ? v0 * below.slope : v0, h & 0x80000000u ? v1 * below.slope : v1));
        });
      }
    });
  }

  // All products of stage l, `columns` chunks of 8 of them, by warps that make 16 kPairs columns at a time. `finish`
  // is called for each unit with a function that visits its (sample, pixel, column, two neighbouring sums).
  template <bool kBackward, int kPairs, typename Finish>
  MG_BODY void products(const ResidentNet& net, int l, int columns, const Finish& finish) {
    const ResidentWindows& windows = kBackward ? net.stages.at[l].backward : net.stages.at[l].forward;
    const int groups = (columns + 2 * kPairs - 1) / (2 * kPairs);
    cta_.phase([&](const Warp& warp) {
      for (int unit = warp.index(); unit < windows.tiles * groups; unit += cta_.warps()) {
        const typename Product::Unit found =
            Product::template unit_of<kBackward>(warp, net, l, unit / groups, unit % groups * 2 * kPairs, columns);
        if (found.first_row + 16 < found.rows && windows.tile_rows > 16) {
          Product::template add_up<kBackward, 2, kPairs>(warp, net, l, found, finish);
        } else {
          Product::template add_up<kBackward, 1, kPairs>(warp, net, l, found, finish);
        }
      }
    });
  }

  MG_BODY void update(const ResidentNet& net, int64_t first, int64_t k) {
    const int elements = net.channels * net.pixels, quads = (elements + 3) / 4;
    const float unscale = *number(net, net.unscale);
    spread(net.samples * quads, [&](const Warp& warp, int i) {
      const int s = i / quads, quad = i % quads;
      if (first + s >= end_) return;
      LangevinStepCoefficients numbers = coefficients_of(net.numbers, k, first + s);
      const float* const mean = means_of(net.numbers, first + s);
      SampleKey key = sample_key(net.counters, first + s);
      const int64_t step = (net.counters.step_at ? *net.counters.step_at : net.counters.step) + k;
      key.step = static_cast<uint32_t>(step);
      key.valid &= (static_cast<uint64_t>(step) >> 32) == 0;
      float normal[4] = {};
      if (numbers.noise_std != 0.0f) {
        const Quad q = normals_of(words_at(key, static_cast<uint32_t>(quad)));
        const float nan = as_float(0x7FC00000u);
        normal[0] = key.valid ? q.v0 : nan, normal[1] = key.valid ? q.v1 : nan;
        normal[2] = key.valid ? q.v2 : nan, normal[3] = key.valid ? q.v3 : nan;
      }
      for (int j = 0; j < 4; ++j) {
        const int element = 4 * quad + j;
        if (element >= elements) break;
        const uint32_t at = static_cast<uint32_t>(4 * (s * elements + element));
        const float slope = unscale * warp.template load<float>(static_cast<uint32_t>(net.dx) + at);
        if (!is_finite(slope)) warp.lower(p_.bad_step, step);
        if (net.mask && !net.mask[(first + s) * elements + element]) continue;
        const float x = warp.template load<float>(static_cast<uint32_t>(net.x) + at);
        if (mean) numbers.reference_mean = mean[element];
        store_state(warp, net, s, element / net.pixels, element % net.pixels,
                    langevin_step_update(numbers, x, slope, normal[j]));
      }
    });
  }

  Cta& cta_;
  const ResidentParams& p_;
  int64_t begin_, end_;  // of this block's samples
};

}  // namespace mgebm
