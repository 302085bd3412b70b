// One parallel region runs all steps. `Sharing` says how its threads divide the work: without batch statistics each
// thread runs the whole chain of some samples and waits for no other.
//
//   forward   z_l -> [statistics -> normalise] -> h_l      last stage: dE/dh_L a'(z_L) at once, h_L is never made
//   backward  [centre] -> dE/dh_(l-1) a'(z_(l-1))           the same products with the other weights
//   edge      dE/dx -> Langevin update                      where a row is whole quads; else by way of memory
//
// The parts: engine.h holds the buffers and divides the work, sweep.h and tile.h compute the products, stage.h and
// norm.h apply activations and norms to them, state.h is the edge.
#include <omp.h>
#include <sched.h>

#include <stdexcept>

#include "mgebm/cpu.h"
#include "ops/conv_chain/conv_chain.h"
#include "ops/conv_chain/stage.h"
#include "ops/conv_chain/state.h"

namespace mgebm::MGEBM_ISA {
namespace {

template <typename T>
void gradient(const Engine<T>& e, const SampleKey& key, int64_t k) {
  const ConvChainParams& p = e.p;
  for (int l = 0; l < p.stages.count; ++l) {
    const ConvStage& stage = p.stages.at[l];
    const Weights weights{stage.forward_weights, stage.forward_rows, e.kept[l].strips};
    const auto finish = [&](int block, int pixel, int strip, float* tile) {
      finish_forward(e, l, block, pixel, strip, tile);
    };
    if (l == 0) {
      convolve(e, stage.forward, Source<float, true>{e.x, stage.in_pixels, stage.in_channels}, weights, finish);
    } else {
      const Kept<T>& below = e.kept[l - 1];
      convolve(e, stage.forward, Source<T, false>{below.h, stage.in_pixels, below.depth}, weights, finish);
    }
    if (!stage.gamma) continue;
    reduce_statistics(e, l);
    normalise(e, l);
  }
  for (int l = p.stages.count - 1; l >= 0; --l) {
    const ConvStage& stage = p.stages.at[l];
    if (stage.gamma) {
      reduce_gradient(e, l);
      centre(e, l);
    }
    if (l == 0) break;
    convolve(
        e, stage.backward, Source<T, false>{e.kept[l].h, stage.out_pixels, e.kept[l].depth},
        Weights{stage.backward_weights, stage.backward_rows, e.kept[l - 1].strips},
        [&](int block, int pixel, int strip, float* tile) { finish_backward(e, l - 1, block, pixel, strip, tile); });
  }
  edge(e, key, k);
}

// Channels that pad a strip or a tile are read as inputs and must be zero.
template <typename T>
void clear_padding(const Engine<T>& e) {
  for (int l = 0; l < e.p.stages.count; ++l) {
    const Kept<T>& k = e.kept[l];
    if (k.depth == e.p.stages.at[l].out_channels) continue;
    const int64_t pixels = e.p.stages.at[l].out_pixels, size = 16LL * k.depth, first = e.first_block * pixels;
    e.share_evenly(e.mine() * pixels, [&](int64_t i) {
      __builtin_memset(static_cast<void*>(k.h + (first + i) * size), 0, size * sizeof(T));
    });
  }
}

// `stop`, shared by the threads of a chain: whether they all leave before step k. Its two slots take turns, so that the
// one for the next step is not written while another thread may still read this one's.
template <typename T>
bool stops(const Engine<T>& e, int64_t k, bool* stop) {
  if (e.threads == 1) return e.interrupt.asked();
  if (e.thread == 0) stop[k % 2] = e.interrupt.asked();
#pragma omp barrier
  return stop[k % 2];
}

template <typename T>
void run_chain(const Engine<T>& e, bool* stop) {
  const KeepSubnormals kept;
  const ConvChainParams& p = e.p;
  SampleKey key = sample_key(p.counters, 0);
  key.valid &= sample_key(p.counters, p.samples - 1).valid;
  const int64_t first_step = p.counters.step_at ? *p.counters.step_at : p.counters.step;
  begin_tiles();
  read_state(e);
  clear_padding(e);
  if (p.gradient) {
    gradient(e, key, 0);
    if (!stops(e, 0, stop)) write_state(e, e.dx, p.gradient);
  } else {
    int64_t k = 0;
    for (; k < p.steps && !stops(e, k, stop); ++k) {
      const int64_t step = first_step + k;
      key.step = static_cast<uint32_t>(step);
      key.valid &= (static_cast<uint64_t>(step) >> 32) == 0;
      gradient(e, key, k);
    }
    // An interrupted chain leaves x as it was.
    if (k == p.steps && !stops(e, k, stop)) write_state(e, e.x, p.x);
  }
  end_tiles();
}

// An engine whose threads share every pass; its buffers are not laid out yet.
template <typename T>
Engine<T> engine(const ConvChainParams& p, Interrupt& interrupt, int threads, int thread) {
  const int blocks = static_cast<int>((p.samples + 15) / 16);
  return {p, interrupt, blocks, threads, thread, false, 0, blocks, nullptr, nullptr, nullptr, nullptr, {}};
}

enum class Sharing {
  kPasses,  // all threads share every pass
  kBlocks,  // each has blocks of its own; they wait for each other at the batch's statistics alone
  kChains,  // no thread waits: each runs the whole chain of a few blocks, and then of the next
};
constexpr int64_t kChainBlocks = 2;

struct Plan {
  Sharing sharing;
  int threads;
  int64_t blocks;  // of a chain, where those are shared out
};

// Below this many products per thread and step, waiting for each other costs more than another thread saves.
constexpr double kGrainProducts = 2e6;

Plan plan_of(const ConvChainParams& p, int threads) {
  double products = 0;
  bool coupled = false;
  for (int l = 0; l < p.stages.count; ++l) {
    const ConvStage& s = p.stages.at[l];
    products += 2.0 * s.out_pixels * s.forward_rows * s.in_channels * s.out_channels;
    coupled |= s.gamma != nullptr;
  }
  const int64_t blocks = (p.samples + 15) / 16;
  if (!coupled && blocks >= threads) {
    return {Sharing::kChains, threads, smaller(kChainBlocks, (blocks + threads - 1) / threads)};
  }
  const double useful = 1 + products * static_cast<double>(p.samples) / kGrainProducts;
  if (useful < threads) threads = static_cast<int>(useful);
  // With unequal shares, all would wait for the thread that has most.
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
  if (p.update.at) some.update.at = p.update.at + first * p.update.by_sample;
  if (p.update.mean) some.update.mean = p.update.mean + first * p.update.mean_by_sample;
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
  Interrupt none;
  if (plan.sharing != Sharing::kChains) return engine<T>(p, none, 1, 0).lay_out(nullptr);
  const ConvChainParams some = part(p, 0, smaller(p.samples, 16 * plan.blocks));
  return engine<T>(some, none, 1, 0).lay_out(nullptr) * plan.threads;
}

template <typename T>
void run(const ConvChainParams& p, int threads) {
  const Plan plan = plan_of(p, threads);
  char* const base = static_cast<char*>(p.workspace);
  Interrupt interrupt;
  if (plan.sharing != Sharing::kChains) {
    bool stop[2] = {};
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
    {
      const int me = omp_get_thread_num();
      Engine<T> e = engine<T>(p, interrupt, plan.threads, me);
      e.lay_out(base);
      if (plan.sharing == Sharing::kBlocks) {
        const int64_t blocks = e.blocks, all = omp_get_num_threads();
        e.own = true;
        e.first_block = static_cast<int>(blocks * me / all);
        e.last_block = static_cast<int>(blocks * (me + 1) / all);
      }
      run_chain(e, stop);
    }
    return;
  }
  const int64_t size = 16 * plan.blocks, each = workspace<T>(p, threads) / plan.threads;
  int64_t next = 0;
  int done = 0;
#pragma omp parallel num_threads(plan.threads)
  {
    const int me = omp_get_thread_num();
    for (;;) {
      const int64_t first = __atomic_fetch_add(&next, size, __ATOMIC_RELAXED);
      if (first >= p.samples || interrupt.asked()) break;
      const ConvChainParams some = part(p, first, smaller(size, p.samples - first));
      Engine<T> e = engine<T>(some, interrupt, 1, me);
      e.lay_out(base + me * each);
      e.own = true;
      run_chain(e, nullptr);
    }
    __atomic_fetch_add(&done, 1, __ATOMIC_RELAXED);
    // The others may be at their last chains for long.
    while (me == 0 && __atomic_load_n(&done, __ATOMIC_RELAXED) < omp_get_num_threads()) {
      interrupt.poll();
      sched_yield();
    }
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
#else
  if (p.bfloat) throw std::runtime_error("conv_chain: the weights are bfloat16, which this instruction set has not");
#endif
  run<float>(p, threads);
}

}  // namespace mgebm::MGEBM_ISA
