// out (samples, elements): a thread makes one quad of one sample. Bytes moved: 4 an element (8 for words), all written.
#include "mgebm/launch.cuh"
#include "ops/noise.h"

namespace mgebm {
namespace {

template <typename T>
__device__ __forceinline__ void store_quad(T* out, int64_t left, bool aligned, T a, T b, T c, T d) {
  if constexpr (sizeof(T) == 4) {
    if (aligned && left >= 4) {
      *reinterpret_cast<float4*>(out) = make_float4(a, b, c, d);
      return;
    }
  }
  out[0] = a;
  if (left > 1) out[1] = b;
  if (left > 2) out[2] = c;
  if (left > 3) out[3] = d;
}

template <Distribution distribution>
__global__ void __launch_bounds__(kThreads) noise_kernel(const NoiseParams p) {
  const int64_t quads = (p.elements + 3) / 4;
  const bool aligned = p.elements % 4 == 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.samples * quads; i += stride) {
    const auto [sample, quad] = split(i, quads);
    const SampleKey key = sample_key(p.counters, sample);
    const Words words = words_at(key, p.first_quad + static_cast<uint32_t>(quad));
    const int64_t at = sample * p.elements + 4 * quad, left = p.elements - 4 * quad;
    if constexpr (distribution == Distribution::kBits) {
      const auto word = [&](uint32_t w) { return key.valid ? static_cast<long long>(w) : -1ll; };
      store_quad(static_cast<long long*>(p.out) + at, left, aligned, word(words.w0), word(words.w1), word(words.w2),
                 word(words.w3));
    } else {
      Quad q = noise_quad(words, distribution);
      if (!key.valid) q.v0 = q.v1 = q.v2 = q.v3 = __int_as_float(0x7FC00000);
      store_quad(static_cast<float*>(p.out) + at, left, aligned, q.v0, q.v1, q.v2, q.v3);
    }
  }
}

}  // namespace

int noise_cuda(const NoiseParams& p, int device, void* stream_handle) {
  const int64_t work = p.samples * ((p.elements + 3) / 4);
  if (work == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (p.distribution) {
    case Distribution::kNormal:
      noise_kernel<Distribution::kNormal><<<blocks_for(work), kThreads, 0, stream>>>(p);
      break;
    case Distribution::kUniform:
      noise_kernel<Distribution::kUniform><<<blocks_for(work), kThreads, 0, stream>>>(p);
      break;
    case Distribution::kBits:
      noise_kernel<Distribution::kBits><<<blocks_for(work), kThreads, 0, stream>>>(p);
      break;
  }
  return cudaGetLastError();
}

}  // namespace mgebm
