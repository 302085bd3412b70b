// A thread runs whole chains of a group of samples and waits for nobody; where there are fewer groups than threads, all
// threads share out each step of the program. convolve.h has the matrix products, layers.h the other steps, team.h the
// sharing out.
#include <omp.h>
#include <sched.h>

#include "mgebm/cpu.h"
#include "mgebm/noise_block.h"
#include "ops/conv_chain/sweep.h"
#include "ops/graph_chain/convolve_bfloat.h"
#include "ops/graph_chain/layers.h"

namespace mgebm::MGEBM_ISA {
namespace {

void run_step(const Group& g, const GraphStep& s) {
  switch (s.kind) {
    case GraphKind::kConvolve:
      return convolve(g, s);
    case GraphKind::kGather:
      return gather(g, s);
    case GraphKind::kPointwise:
      return pointwise(g, s);
    case GraphKind::kAffine:
      return affine(g, s);
    case GraphKind::kAdd:
      return add(g, s);
    case GraphKind::kMultiply:
      return multiply(g, s);
    case GraphKind::kNorm:
      return normalise(g, s);
    case GraphKind::kNormBack:
      return normalise_back(g, s);
    case GraphKind::kSoftmax:
      return log_sum_exp(g, s, true);
    case GraphKind::kLogSumExp:
      return log_sum_exp(g, s, false);
    case GraphKind::kCopy:
      return copy(g, s);
    case GraphKind::kMaxPool:
      return max_pool(g, s);
    case GraphKind::kMaxPoolBack:
      return max_pool_back(g, s);
    case GraphKind::kDepthwise:
      return depthwise(g, s);
    case GraphKind::kRearrange:
      return rearrange(g, s);
    case GraphKind::kRearrangeBack:
      return rearrange_back(g, s);
    case GraphKind::kFill:
      return fill(g, s);
  }
}

// body(sample, pixel) for every pixel of x.
template <typename Body>
void each_pixel(const Group& g, const Body& body) {
  const int pixels = g.p.pixels;
  g.share(static_cast<int64_t>(g.count) * pixels, [&](int64_t i) { body(static_cast<int>(i / pixels), i % pixels); });
}

// (channel, pixel) <-> [pixel][depth], for each sample; what fills the depth up becomes zero.
void read_state(const Group& g) {
  const GraphChainParams& p = g.p;
  const int depth = g.buffer(p.state).depth;
  each_pixel(g, [&](int sample, int64_t pixel) {
    const float* in = p.x + (g.first + sample) * p.channels * p.pixels + pixel;
    float* out = g.at(p.state, sample) + pixel * depth;
    for (int c = 0; c < depth; ++c) out[c] = c < p.channels ? in[static_cast<int64_t>(c) * p.pixels] : 0.0f;
  });
}

void write(const Group& g, int buffer, float* to) {
  const GraphChainParams& p = g.p;
  const int depth = g.buffer(buffer).depth;
  each_pixel(g, [&](int sample, int64_t pixel) {
    const float* in = g.at(buffer, sample) + pixel * depth;
    float* out = to + (g.first + sample) * p.channels * p.pixels + pixel;
    for (int c = 0; c < p.channels; ++c) out[static_cast<int64_t>(c) * p.pixels] = in[c];
  });
}

// Elements first ... first + count - 1 of one sample, in (channel, pixel) order; normal[i apart]: of element first + i.
MG_INLINE void update_elements(const Group& g, int64_t k, int sample, int64_t first, int count, const float* normal,
                               int apart) {
  const GraphChainParams& p = g.p;
  const int depth = g.buffer(p.state).depth, upstream = g.buffer(p.slope).depth;
  LangevinStepCoefficients own = coefficients_of(p.update, k, g.first + sample);
  const float* mean = means_of(p.update, g.first + sample);
  float* x = g.at(p.state, sample);
  const float* slope = g.at(p.slope, sample);
  const uint8_t* mask = p.mask ? p.mask + (g.first + sample) * p.channels * p.pixels + first : nullptr;
  if (p.pixels == 1 && apart == 1 && !mask && !mean) {
    x += first, slope += first;
#pragma omp simd
    for (int i = 0; i < count; ++i) x[i] = langevin_step_update(own, x[i], slope[i], normal[i]);
    return;
  }
  int64_t c = first / p.pixels, pixel = first % p.pixels;
  for (int i = 0; i < count; ++i) {
    float& value = x[pixel * depth + c];
    if (mean) own.reference_mean = mean[first + i];
    const float next = langevin_step_update(own, value, slope[pixel * upstream + c], normal[i * apart]);
    if (!mask || mask[i]) value = next;
    if (++pixel == p.pixels) pixel = 0, ++c;
  }
}

// Of samples with few elements: a quad of sixteen samples at once.
void update_small(const Group& g, int64_t k, const SampleKey& key, const uint64_t* ids) {
  const GraphChainParams& p = g.p;
  const int elements = p.channels * p.pixels, quads = (elements + 3) / 4;
  const bool noise = p.update.at || p.update.all.noise_std != 0.0f;
  g.share((g.count + 15) / 16, [&](int64_t block) {
    const int first = static_cast<int>(block) * 16, some = g.count - first < 16 ? g.count - first : 16;
    for (int quad = 0; quad < quads; ++quad) {
      alignas(64) uint32_t words[4][16];
      alignas(64) float normal[4][16] = {};
      const int count = elements - 4 * quad < 4 ? elements - 4 * quad : 4;
      if (noise) {
        philox_samples(key, static_cast<uint32_t>(quad), ids + first, words);
        for (int pair = 0; pair < (count + 1) / 2; ++pair) {
#pragma omp simd
          for (int i = 0; i < 16; ++i) {
            const NormalPair normals = normals_of(words[2 * pair][i], words[2 * pair + 1][i]);
            normal[2 * pair][i] = normals.v0, normal[2 * pair + 1][i] = normals.v1;
          }
        }
        if (!key.valid) {
          for (int i = 0; i < 64; ++i) normal[i / 16][i % 16] = __builtin_nanf("");
        }
      }
      for (int i = 0; i < some; ++i) update_elements(g, k, first + i, 4 * quad, count, &normal[0][i], 16);
    }
  });
}

void update_large(const Group& g, int64_t k, const SampleKey& key, const uint64_t* ids) {
  const GraphChainParams& p = g.p;
  const int64_t elements = static_cast<int64_t>(p.channels) * p.pixels;
  const int64_t blocks = (elements + kBlockElements - 1) / kBlockElements;
  g.share(g.count * blocks, [&](int64_t i) {
    const int sample = static_cast<int>(i / blocks);
    const int64_t first = i % blocks * kBlockElements;
    const int count = static_cast<int>(smaller(kBlockElements, elements - first));
    alignas(64) float normal[kBlockElements] = {};
    if (p.update.at || p.update.all.noise_std != 0.0f) {
      SampleKey mine = key;
      mine.sample = static_cast<uint32_t>(ids[sample]);
      noise_quads<Distribution::kNormal>(mine, static_cast<uint32_t>(first / 4), (count + 3) / 4, normal);
    }
    update_elements(g, k, sample, first, count, normal, 1);
  });
}

// Whether all threads of a group leave before step k; the two slots of `stop` take turns, so that the one for the next
// step is not written while another thread may still read this one's.
bool stops(const Group& g, int64_t k, bool* stop) {
  if (g.threads == 1) return g.interrupt.asked();
  if (g.thread == 0) stop[k % 2] = g.interrupt.asked();
#pragma omp barrier
  return stop[k % 2];
}

void run_chain(const Group& g, uint64_t* ids, bool* stop) {
  const KeepSubnormals kept;
  const GraphChainParams& p = g.p;
  SampleKey key = sample_key(p.counters, 0);
  key.valid &= sample_key(p.counters, p.samples - 1).valid;
  const int64_t first_step = p.counters.step_at ? *p.counters.step_at : p.counters.step;
  // Lanes past the last sample repeat it. Every thread writes the same.
  for (int i = 0; i < (g.room + 15) / 16 * 16; ++i) {
    ids[i] = sample_key(p.counters, g.first + smaller(i, g.count - 1)).sample;
  }
  begin_tiles();
  read_state(g);
  const bool small = static_cast<int64_t>(p.channels) * p.pixels < 64;
  int64_t k = 0;
  for (; k < (p.gradient ? 1 : p.count) && !stops(g, k, stop); ++k) {
    const int64_t step = first_step + k;
    key.step = static_cast<uint32_t>(step);
    key.valid &= (static_cast<uint64_t>(step) >> 32) == 0;
    for (int i = 0; i < p.steps.count; ++i) run_step(g, p.steps.at[i]);
    if (p.gradient) continue;
    small ? update_small(g, k, key, ids) : update_large(g, k, key, ids);
  }
  // An interrupted chain leaves x as it was.
  if (!stops(g, k, stop)) p.gradient ? write(g, p.slope, p.gradient) : write(g, p.state, p.x);
  end_tiles();
}

struct Plan {
  bool shared;  // all threads on every step of one group after the other
  int threads, room;
  int64_t rounded_bytes, own_bytes;  // of bfloat16 products, of each group and of each thread
  int64_t split_bytes;               // of the weights of split products
};

// A group's buffers in half of a core's L2, and rows enough for the matrix products of maps of one pixel.
Plan plan_of(const GraphChainParams& p, int threads) {
  constexpr int64_t kMostSamples = 64;
  const int64_t bytes = larger(1, p.sample_floats * static_cast<int64_t>(sizeof(float)));
  int64_t weights = 0, dense = 0, own = 0, rounded = 0, split = 0;  // dense: weights that are read for a row a sample
  for (int i = 0; i < p.steps.count; ++i) {
    const GraphStep& s = p.steps.at[i];
    if (s.kind != GraphKind::kConvolve) continue;
    const int64_t here = (s.bfloat_weights ? 32LL : 64LL) * s.rows * s.inputs * strips_of(s.outputs);
    weights += here, dense += s.windows.outputs == 1 ? here : 0;
    if (s.split >= 0) {
      const SplitProduct product;
      split += 2 * split_numbers(s);
      own = larger(own, aligned(run_bytes(product.windows(), s.inputs, p.samples)));
      rounded = larger(rounded, rounded_bytes(product.frame(), s.inputs));
    }
    if (!s.bfloat_weights) continue;
    own = larger(own, aligned(run_bytes(s.windows, s.inputs, p.samples)));
    rounded = larger(rounded, rounded_bytes({s.place, s.placed}, s.inputs));
  }
  // The weights are read once a group and step: that should be little beside what its samples' buffers are.
  int64_t room = smaller(larger(larger(chunk_bytes(), weights / 4) / bytes, 1), kMostSamples);
  room = smaller(room, (p.samples + threads - 1) / threads);
  // Whole tiles of rows.
  const int at_once = own ? kPairRows : kRowsAtOnce;
  if (room > at_once) room = room / at_once * at_once;
  const int64_t groups = (p.samples + room - 1) / room;
  const int64_t rounds = (groups + threads - 1) / threads;
  const bool idle = 4 * groups < 3 * rounds * threads;
  const auto plan = [&](bool shared, int64_t by, int64_t samples) {
    return Plan{shared, static_cast<int>(by), static_cast<int>(samples), aligned(rounded * samples), own, split};
  };
  // Threads that share a step share out the weights of a dense layer as well, where each would read all of them.
  const bool read_twice = dense > 4 * chunk_bytes() && groups <= threads;
  if (threads > 1 && (idle || read_twice) && bytes >= (256 << 10))
    return plan(true, threads, smaller(p.samples, larger(1, weights / 4 / bytes)));
  return plan(false, smaller(threads, groups), room);
}

int64_t ids_bytes(const Plan& plan) { return (plan.room + 15) / 16 * 16 * static_cast<int64_t>(sizeof(uint64_t)); }
// The samples' numbers, what is rounded for a product, and the buffers.
int64_t group_bytes(const GraphChainParams& p, const Plan& plan) {
  return ids_bytes(plan) + plan.rounded_bytes + aligned(p.sample_floats * plan.room * sizeof(float));
}

}  // namespace

int64_t graph_chain_workspace(const GraphChainParams& p, int threads) {
  const Plan plan = plan_of(p, threads);
  return group_bytes(p, plan) * (plan.shared ? 1 : plan.threads) + plan.own_bytes * plan.threads + plan.split_bytes;
}

void graph_chain_cpu(const GraphChainParams& p, int threads) {
  const Plan plan = plan_of(p, threads);
  Interrupt interrupt;
  const int64_t each = group_bytes(p, plan);
  bool stop[2] = {};
  int64_t next = 0;
  int done = 0;
  char* const own_bytes = static_cast<char*>(p.workspace) + each * (plan.shared ? 1 : plan.threads);
  Bf16* const split = reinterpret_cast<Bf16*>(own_bytes + plan.own_bytes * plan.threads);
  for (int i = 0; i < p.steps.count; ++i) {
    if (p.steps.at[i].split >= 0) split_weights(p.steps.at[i], split + p.steps.at[i].split);
  }
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
    const int me = omp_get_thread_num();
    char* const base = static_cast<char*>(p.workspace) + (plan.shared ? 0 : me * each);
    char* const own = own_bytes + me * plan.own_bytes;
    uint64_t* const ids = reinterpret_cast<uint64_t*>(base);
    char* const rounded = base + ids_bytes(plan);
    float* const buffers = reinterpret_cast<float*>(rounded + plan.rounded_bytes);
    for (int64_t first = 0;;) {
      if (!plan.shared) first = __atomic_fetch_add(&next, plan.room, __ATOMIC_RELAXED);
      if (first >= p.samples || (!plan.shared && interrupt.asked())) break;
      const int count = static_cast<int>(smaller(plan.room, p.samples - first));
      const int all = plan.shared ? omp_get_num_threads() : 1;
      const int mine = plan.shared ? me : 0;
      run_chain({{interrupt, me == 0, all, mine}, p, first, count, plan.room, buffers, rounded, own, split}, ids, stop);
      if (plan.shared) first += plan.room;
    }
    __atomic_fetch_add(&done, 1, __ATOMIC_RELAXED);
    // The others may be at their last chains for long.
    while (!plan.shared && me == 0 && __atomic_load_n(&done, __ATOMIC_RELAXED) < omp_get_num_threads()) {
      interrupt.poll();
      sched_yield();
    }
  }
}

}  // namespace mgebm::MGEBM_ISA
