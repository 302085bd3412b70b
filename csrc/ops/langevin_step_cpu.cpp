// A unit of work is a block of one sample's elements: its normals are made in a buffer that stays in L1, then used.
// Blocks run along memory: logical order where x is contiguous, tiles of pixels where channels are innermost.
#include "mgebm/cpu.h"
#include "mgebm/noise_block.h"
#include "ops/langevin_step.h"

namespace mgebm::MGEBM_ISA {
namespace {

// buffer[i * stride] <- the normal of element first + i: elements may start inside a quad.
void normals(const SampleKey& key, int64_t first, int64_t count, float* buffer, int64_t stride) {
  alignas(64) float block[kBlockElements + 4];
  for (int64_t done = 0; done < count;) {
    const int64_t skip = (first + done) & 3;
    int64_t take = count - done;
    if (take > kBlockElements - skip) take = kBlockElements - skip;
    const int quads = static_cast<int>((skip + take + 3) / 4);
    noise_quads<Distribution::kNormal>(key, static_cast<uint32_t>((first + done) / 4), quads, block);
    for (int64_t i = 0; i < take; ++i) buffer[(done + i) * stride] = block[skip + i];
    done += take;
  }
}

template <typename Gradient>
void run(const LangevinStepCoefficients& k, float* __restrict__ x, const Gradient* __restrict__ gradient,
         const float* __restrict__ normal, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = langevin_step_update(k, x[i], load_gradient(gradient + i), normal[i]);
}

template <typename Gradient>
void run_tethered(LangevinStepCoefficients k, float* __restrict__ x, const Gradient* __restrict__ gradient,
                  const float* __restrict__ mean, const float* __restrict__ normal, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    LangevinStepCoefficients here = k;
    here.reference_mean = mean[i];
    x[i] = langevin_step_update(here, x[i], load_gradient(gradient + i), normal[i]);
  }
}

template <typename Gradient>
struct Sample {
  const LangevinStepParams& p;
  float* x;
  const Gradient* gradient;
  const uint8_t* mask;
  const float* mean;
};

// Any strides, any mask: element i of the block is logical element first + i.
template <typename Gradient>
void run_strided(LangevinStepCoefficients k, const Sample<Gradient>& s, int64_t first, const float* normal,
                 int64_t count) {
  const LangevinStepParams& p = s.p;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = (first + i) / p.spatial, at = (first + i) % p.spatial;
    if (s.mask && !s.mask[c * p.mask_strides.channel + at * p.mask_strides.spatial]) continue;
    float& value = s.x[c * p.x_strides.channel + at * p.x_strides.spatial];
    const Gradient* g = s.gradient + c * p.grad_strides.channel + at * p.grad_strides.spatial;
    if (s.mean) k.reference_mean = s.mean[first + i];
    value = langevin_step_update(k, value, load_gradient(g), normal[i]);
  }
}

template <typename Gradient>
void run_masked(const LangevinStepCoefficients& k, float* __restrict__ x, const Gradient* __restrict__ gradient,
                const uint8_t* __restrict__ mask, const float* __restrict__ normal, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float value = langevin_step_update(k, x[i], load_gradient(gradient + i), normal[i]);
    x[i] = mask[i] ? value : x[i];
  }
}

template <typename Gradient>
void langevin_step_typed(const LangevinStepParams& p, int threads) {
  const int64_t elements = p.channels * p.spatial;
  const bool contiguous = p.x_strides.channel == p.spatial && p.x_strides.spatial == 1;
  const bool same_layout =
      p.x_strides.channel == p.grad_strides.channel && p.x_strides.spatial == p.grad_strides.spatial;
  const bool same_mask = p.mask && p.mask_strides.channel == p.spatial && p.mask_strides.spatial == 1;
  const bool tiled = same_layout && !contiguous && !p.mask && !p.update.mean && p.channels <= kBlockElements;
  const int64_t tile = tiled ? kBlockElements / p.channels * p.channels : kBlockElements;
  const int64_t blocks = (elements + tile - 1) / tile;
  threads = threads_for(p.samples * elements, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const KeepSubnormals kept;
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.samples * blocks; ++unit) {
      const int64_t sample = unit / blocks, first = unit % blocks * tile;
      const int64_t count = elements - first < tile ? elements - first : tile;
      const Sample<Gradient> s{p, p.x + sample * p.x_strides.sample,
                               static_cast<const Gradient*>(p.grad) + sample * p.grad_strides.sample,
                               p.mask ? p.mask + sample * p.mask_strides.sample : nullptr, means_of(p.update, sample)};
      const LangevinStepCoefficients k = coefficients_of(p.update, 0, sample);
      const SampleKey key = sample_key(p.counters, sample);
      alignas(64) float normal[kBlockElements + 4];
      if (k.noise_std == 0.0f) {
        for (int64_t i = 0; i < count; ++i) normal[i] = 0.0f;
      } else if (tiled) {
        const int64_t pixel = first / p.channels, pixels = count / p.channels;
        for (int64_t c = 0; c < p.channels; ++c) normals(key, c * p.spatial + pixel, pixels, normal + c, p.channels);
      } else {
        // Blocks of a contiguous run start at whole quads.
        noise_quads<Distribution::kNormal>(key, static_cast<uint32_t>(first / 4), static_cast<int>((count + 3) / 4),
                                           normal);
      }
      if (contiguous && same_layout && s.mean && !p.mask) {
        run_tethered(k, s.x + first, s.gradient + first, s.mean + first, normal, count);
      } else if (tiled || (contiguous && same_layout && !p.mask)) {
        run(k, s.x + first, s.gradient + first, normal, count);
      } else if (contiguous && same_layout && same_mask && !s.mean) {
        run_masked(k, s.x + first, s.gradient + first, s.mask + first, normal, count);
      } else {
        run_strided(k, s, first, normal, count);
      }
    }
  }
}

}  // namespace

void langevin_step_cpu(const LangevinStepParams& p, int threads) {
  switch (p.grad_type) {
    case GradType::kFloat:
      return langevin_step_typed<float>(p, threads);
    case GradType::kHalf:
      return langevin_step_typed<Half>(p, threads);
    case GradType::kBfloat:
      return langevin_step_typed<Bfloat>(p, threads);
  }
}

}  // namespace mgebm::MGEBM_ISA
