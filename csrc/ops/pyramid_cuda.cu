// A block of threads makes every level of one plane after another: the input is read once, sums of the finest level
// stay in shared memory and each coarser level adds up those of the level before. A group of `group` lanes shares one
// output of the finest level, so that few large blocks (64 -> 1) still use a whole warp. Planes whose finest level does
// not fit shared memory take one launch a level, each straight from the input. Bytes moved: the input once, and 4 an
// output value.
#include "mgebm/launch.cuh"
#include "ops/pyramid.h"

namespace mgebm {
namespace {

constexpr int64_t kMaxSharedSums = 2048;  // two levels of doubles: 32 KB

template <typename Sum>
__device__ __forceinline__ Sum group_sum(Sum value, int group) {
  for (int offset = group / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset, group);
  return value;
}

// The sum of block `index` of `to` in a plane of extent `from`, taken by lanes lane, lane + lanes, ...
template <typename Sum, typename Source>
__device__ __forceinline__ Sum block_sum(const Source* source, const Extent& from, const Extent& to, int64_t index,
                                         int lane, int lanes) {
  const int64_t fd = from.depth / to.depth, fh = from.height / to.height, fw = from.width / to.width;
  const auto [row, w] = split(index, to.width);
  const auto [d, h] = split(row, to.height);
  const Source* const corner = source + (d * fd * from.height + h * fh) * from.width + w * fw;
  Sum sum = 0;
  for (int64_t i = lane; i < fd * fh * fw; i += lanes) {
    const auto [line, k] = split(i, fw);
    const auto [z, y] = split(line, fh);
    sum += static_cast<Sum>(corner[(z * from.height + y) * from.width + k]);
  }
  return sum;
}

// Levels [first, first + levels) of each plane; level `first` comes straight from the input.
template <typename Source, typename Sum>
__global__ void __launch_bounds__(kThreads) pyramid_kernel(const PyramidParams p, int first, int levels, int group) {
  __shared__ Sum shared[2][kMaxSharedSums];
  const int64_t pixels = volume(p.extent);
  const int lane = threadIdx.x % group, member = threadIdx.x / group, members = kThreads / group;
  for (int64_t plane = blockIdx.x; plane < p.planes; plane += gridDim.x) {
    const Source* const source = static_cast<const Source*>(p.input) + plane * pixels;
    const Extent finest = p.levels.at[first].extent;
    const int64_t size = volume(finest);
    // Every lane of a warp takes part in the shuffles: the loop bound is the same for all.
    for (int64_t base = 0; base < size; base += members) {
      const int64_t index = base + member;
      Sum sum = index < size ? block_sum<Sum>(source, p.extent, finest, index, lane, group) : Sum(0);
      sum = group_sum(sum, group);
      if (lane == 0 && index < size) {
        p.levels.at[first].output[plane * size + index] = block_mean(sum, pixels / size);
        if (levels > 1) shared[0][index] = sum;
      }
    }
    for (int level = 1; level < levels; ++level) {
      __syncthreads();
      const Extent from = p.levels.at[first + level - 1].extent, to = p.levels.at[first + level].extent;
      const int64_t count = volume(to);
      for (int64_t index = threadIdx.x; index < count; index += kThreads) {
        const Sum sum = block_sum<Sum>(shared[(level - 1) % 2], from, to, index, 0, 1);
        p.levels.at[first + level].output[plane * count + index] = block_mean(sum, pixels / count);
        shared[level % 2][index] = sum;
      }
    }
    __syncthreads();
  }
}

template <typename Source, typename Sum>
int launch(const PyramidParams& p, cudaStream_t stream) {
  const int64_t pixels = volume(p.extent);
  for (int first = 0; first < p.levels.count;) {
    const int64_t size = volume(p.levels.at[first].extent);
    const bool shared = size <= kMaxSharedSums;
    const int levels = shared ? p.levels.count - first : 1;
    int group = 1;
    while (group < 32 && 2 * group * size <= kThreads && 2 * group <= pixels / size) group *= 2;
    const unsigned blocks = static_cast<unsigned>(p.planes < kMaxBlocks ? p.planes : kMaxBlocks);
    pyramid_kernel<Source, Sum><<<blocks, kThreads, 0, stream>>>(p, first, levels, group);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    first += levels;
  }
  return cudaSuccess;
}

}  // namespace

int pyramid_cuda(const PyramidParams& p, int device, void* stream_handle) {
  if (p.planes == 0 || p.levels.count == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  return p.input_is_bytes ? launch<uint8_t, int32_t>(p, stream) : launch<float, double>(p, stream);
}

}  // namespace mgebm
