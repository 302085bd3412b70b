// The resident chain's kernel: see resident.h. A block of `warps` warps holds `samples` chains in shared memory; a
// launch reads its weights and x once from memory and writes x once.
#include "mgebm/launch.cuh"
#include "op_table.h"
#include "ops/conv_chain/resident.h"

namespace mgebm {
namespace {

constexpr int kMostThreads = 512;

__global__ void __launch_bounds__(kMostThreads, 1) conv_chain_kernel(const __grid_constant__ ResidentParams p) {
  extern __shared__ uint4 shared[];
  DeviceCta cta(reinterpret_cast<char*>(shared));
  Resident<DeviceCta>(cta, p).run();
}

}  // namespace

int conv_chain_cuda(const ResidentParams& p, int device, void* stream) {
  if (p.samples == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto kernel = conv_chain_kernel;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.shared_bytes);
  if (status != cudaSuccess) return status;
  kernel<<<p.blocks, p.warps * kLanes, p.shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace mgebm
