// A thread writes four neighbouring output values of one row (one where the width is no multiple of four).
// Bytes moved: 4 an output value, and the input, which the cache serves after the first of a block's rows.
#include "mgebm/launch.cuh"
#include "ops/upsample.h"

namespace mgebm {
namespace {

template <int kVector>
__global__ void __launch_bounds__(kThreads) upsample_kernel(const UpsampleParams p) {
  const Extent out{p.extent.depth * p.factor.depth, p.extent.height * p.factor.height, p.extent.width * p.factor.width};
  const int64_t in_volume = volume(p.extent), groups = out.width / kVector;
  const int64_t work = p.planes * volume(out) / kVector;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < work; i += stride) {
    const auto [row, column] = split(i, groups);
    const auto [slice, h] = split(row, out.height);
    const auto [plane, d] = split(slice, out.depth);
    const float* const line = p.input + plane * in_volume + upsample_source(p.extent, p.factor, d, h, 0);
    float value[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) value[j] = line[split(column * kVector + j, p.factor.width).quotient];
    if constexpr (kVector == 4) {
      reinterpret_cast<float4*>(p.output)[i] = make_float4(value[0], value[1], value[2], value[3]);
    } else {
      p.output[i] = value[0];
    }
  }
}

}  // namespace

int upsample_cuda(const UpsampleParams& p, int device, void* stream_handle) {
  const int64_t width = p.extent.width * p.factor.width;
  const int64_t total = p.planes * volume(p.extent) * volume(p.factor);
  if (total == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (width % 4 == 0 && reinterpret_cast<uintptr_t>(p.output) % 16 == 0) {
    upsample_kernel<4><<<blocks_for(total / 4), kThreads, 0, stream>>>(p);
  } else {
    upsample_kernel<1><<<blocks_for(total), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace mgebm
