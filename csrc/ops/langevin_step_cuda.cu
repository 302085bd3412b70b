// A thread updates one quad (four elements that share a Philox call) of one sample.
// Contiguous x and grad with whole quads: 128-bit loads and stores, 12 bytes a float32 pixel (x twice, grad once).
// Any other layout or mask: the same arithmetic with an address for each element.
#include "mgebm/launch.cuh"
#include "ops/langevin_step.h"

namespace mgebm {
namespace {

struct Gradients {
  float g0, g1, g2, g3;
};

__device__ __forceinline__ Gradients load_quad(const float* at) {
  const float4 v = *reinterpret_cast<const float4*>(at);
  return {v.x, v.y, v.z, v.w};
}

template <typename Gradient>
__device__ __forceinline__ Gradients load_quad(const Gradient* at) {
  const ushort4 v = *reinterpret_cast<const ushort4*>(at);
  const Gradient a{v.x}, b{v.y}, c{v.z}, d{v.w};
  return {load_gradient(&a), load_gradient(&b), load_gradient(&c), load_gradient(&d)};
}

__device__ __forceinline__ Quad normals_or_nan(const LangevinStepParams& p, const LangevinStepCoefficients& k,
                                               int64_t sample, int64_t quad) {
  if (k.noise_std == 0.0f) return {0.0f, 0.0f, 0.0f, 0.0f};
  const SampleKey key = sample_key(p.counters, sample);
  Quad q = normals_of(words_at(key, static_cast<uint32_t>(quad)));
  if (!key.valid) q.v0 = q.v1 = q.v2 = q.v3 = __int_as_float(0x7FC00000);
  return q;
}

template <typename Gradient>
__global__ void __launch_bounds__(kThreads) langevin_step_contiguous_kernel(const LangevinStepParams p) {
  const int64_t quads = p.channels * p.spatial / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.samples * quads; i += stride) {
    const auto [sample, quad] = split(i, quads);
    const LangevinStepCoefficients k = coefficients_of(p.update, 0, sample);
    float4* const at = reinterpret_cast<float4*>(p.x) + i;
    float4 x = *at;
    const Gradients g = load_quad(static_cast<const Gradient*>(p.grad) + 4 * i);
    const Quad q = normals_or_nan(p, k, sample, quad);
    x.x = langevin_step_update(k, x.x, g.g0, q.v0);
    x.y = langevin_step_update(k, x.y, g.g1, q.v1);
    x.z = langevin_step_update(k, x.z, g.g2, q.v2);
    x.w = langevin_step_update(k, x.w, g.g3, q.v3);
    *at = x;
  }
}

template <typename Gradient>
__device__ __forceinline__ void update_element(const LangevinStepParams& p, LangevinStepCoefficients k, int64_t sample,
                                               int64_t element, float normal) {
  if (element >= p.channels * p.spatial) return;
  const auto [c, s] = split(element, p.spatial);
  const Strides& xs = p.x_strides;
  const Strides& gs = p.grad_strides;
  const Strides& ms = p.mask_strides;
  if (p.mask && !p.mask[sample * ms.sample + c * ms.channel + s * ms.spatial]) return;
  float* const x = p.x + sample * xs.sample + c * xs.channel + s * xs.spatial;
  const Gradient* const g = static_cast<const Gradient*>(p.grad) + sample * gs.sample + c * gs.channel + s * gs.spatial;
  if (const float* const mean = means_of(p.update, sample)) k.reference_mean = mean[element];
  *x = langevin_step_update(k, *x, load_gradient(g), normal);
}

template <typename Gradient>
__global__ void __launch_bounds__(kThreads) langevin_step_strided_kernel(const LangevinStepParams p) {
  const int64_t quads = (p.channels * p.spatial + 3) / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.samples * quads; i += stride) {
    const auto [sample, quad] = split(i, quads);
    const LangevinStepCoefficients k = coefficients_of(p.update, 0, sample);
    const Quad q = normals_or_nan(p, k, sample, quad);
    update_element<Gradient>(p, k, sample, 4 * quad + 0, q.v0);
    update_element<Gradient>(p, k, sample, 4 * quad + 1, q.v1);
    update_element<Gradient>(p, k, sample, 4 * quad + 2, q.v2);
    update_element<Gradient>(p, k, sample, 4 * quad + 3, q.v3);
  }
}

template <typename Gradient>
bool takes_vectors(const LangevinStepParams& p) {
  const bool contiguous = p.x_strides.spatial == 1 && p.x_strides.channel == p.spatial && p.grad_strides.spatial == 1 &&
                          p.grad_strides.channel == p.spatial;
  return contiguous && !p.mask && !p.update.mean && p.channels * p.spatial % 4 == 0 &&
         reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.grad) % (4 * sizeof(Gradient)) == 0;
}

template <typename Gradient>
int launch(const LangevinStepParams& p, cudaStream_t stream) {
  const int64_t work = p.samples * ((p.channels * p.spatial + 3) / 4);
  if (takes_vectors<Gradient>(p)) {
    langevin_step_contiguous_kernel<Gradient><<<blocks_for(work), kThreads, 0, stream>>>(p);
  } else {
    langevin_step_strided_kernel<Gradient><<<blocks_for(work), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace

int langevin_step_cuda(const LangevinStepParams& p, int device, void* stream_handle) {
  if (p.samples == 0 || p.channels == 0 || p.spatial == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (p.grad_type) {
    case GradType::kFloat:
      return launch<float>(p, stream);
    case GradType::kHalf:
      return launch<Half>(p, stream);
    case GradType::kBfloat:
      return launch<Bfloat>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mgebm
