// What every launcher needs: the device made current, a grid within bounds, and a flat index split without 64-bit
// division.
#pragma once

#include <cuda_runtime.h>

#include "macros.h"

namespace mgebm {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 22;  // grid-stride loops take what lies above

inline unsigned blocks_for(int64_t work) {
  const int64_t blocks = (work + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// Makes `device` current for the launch and puts the caller's device back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) status_ = cudaSetDevice(device);
    changed_ = status_ == cudaSuccess && previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  cudaError_t status_;
  int previous_ = 0;
  bool changed_ = false;
};

struct Split {
  int64_t quotient, remainder;
};

// 32-bit division costs a fifth of 64-bit division, and nearly every index fits.
__device__ __forceinline__ Split split(int64_t index, int64_t by) {
  if (((index | by) >> 32) == 0) {
    const uint32_t quotient = static_cast<uint32_t>(index) / static_cast<uint32_t>(by);
    return {quotient, static_cast<uint32_t>(index) - quotient * static_cast<uint32_t>(by)};
  }
  const int64_t quotient = index / by;
  return {quotient, index - quotient * by};
}

}  // namespace mgebm
