#include "mgebm/cpu.h"
#include "mgebm/noise_block.h"
#include "ops/noise.h"

namespace mgebm::MGEBM_ISA {
namespace {

void bits(const SampleKey& key, uint32_t first_quad, int64_t count, int64_t* out) {
  WordBlock block;
  philox_block(key, first_quad, static_cast<int>((count + 3) / 4), block);
  for (int64_t e = 0; e < count; ++e) out[e] = key.valid ? block.w[e % 4][e / 4] : -1;
}

template <Distribution distribution>
void draws(const SampleKey& key, uint32_t first_quad, int64_t count, float* out) {
  const int whole = static_cast<int>(count / 4);
  noise_quads<distribution>(key, first_quad, whole, out);
  if (count % 4) {
    float tail[4];
    noise_quads<distribution>(key, first_quad + static_cast<uint32_t>(whole), 1, tail);
    for (int64_t j = 0; j < count % 4; ++j) out[4 * whole + j] = tail[j];
  }
}

}  // namespace

void noise_cpu(const NoiseParams& p, int threads) {
  const int64_t blocks = (p.elements + kBlockElements - 1) / kBlockElements;
  threads = threads_for(p.samples * p.elements, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const KeepSubnormals kept;
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.samples * blocks; ++unit) {
      const int64_t sample = unit / blocks, first = unit % blocks * kBlockElements;
      const int64_t count = p.elements - first < kBlockElements ? p.elements - first : kBlockElements;
      const SampleKey key = sample_key(p.counters, sample);
      const uint32_t quad = p.first_quad + static_cast<uint32_t>(first / 4);
      const int64_t at = sample * p.elements + first;
      switch (p.distribution) {
        case Distribution::kNormal:
          draws<Distribution::kNormal>(key, quad, count, static_cast<float*>(p.out) + at);
          break;
        case Distribution::kUniform:
          draws<Distribution::kUniform>(key, quad, count, static_cast<float*>(p.out) + at);
          break;
        case Distribution::kBits:
          bits(key, quad, count, static_cast<int64_t*>(p.out) + at);
          break;
      }
    }
  }
}

}  // namespace mgebm::MGEBM_ISA
