// A warp of a resident kernel, written once and run twice: on a GPU, where a thread is one of its lanes, and on the
// host for tests, where one object is all 32 and shared memory is checked at every access.
//
//   cta.phase(f)      f(warp) for every warp of the block, then a barrier
//   warp.each(f)      f(lane) for every lane; what a lane keeps from one `each` to the next is a PerLane
//   warp.load_matrices, warp.multiply                   ldmatrix and mma.sync m16n8k16, for all lanes together
//   warp.load<V>(at), warp.store(at, value)              shared memory, by byte offset
//
// Between two barriers a word of shared memory may be written by one warp only, and then read by no other. (A word is
// 16 bits.)
#pragma once

#include "macros.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define MG_BODY __device__ __forceinline__
#else
#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#define MG_BODY inline
#endif

namespace mgebm {

constexpr int kLanes = 32;

// A matrix operand of 16 x 16 (A) or of 16 x 16 as two of 16 x 8 (B), and an accumulator of 16 x 8: what a lane holds.
struct Operand {
  uint32_t r[4];
};
struct Accumulator {
  float v[4];
};

#if defined(__CUDACC__)

template <typename V>
struct PerLane {
  V value;
  MG_BODY V& operator[](int) { return value; }
};

// Two floats as float16 in one word, the first in its low half.
MG_BODY uint32_t pack(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
MG_BODY float unpack(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

class DeviceWarp {
 public:
  __device__ explicit DeviceWarp(char* shared) : shared_(shared) {}
  __device__ int index() const { return static_cast<int>(threadIdx.x) / kLanes; }

  template <typename Body>
  MG_BODY void each(const Body& body) const {
    body(static_cast<int>(threadIdx.x) % kLanes);
  }

  // Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
  template <bool kTransposed>
  MG_BODY void load_matrices(PerLane<Operand>& to, const PerLane<uint32_t>& at) const {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_)) + at.value;
    uint32_t* r = to.value.r;
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address));
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address));
    }
  }

  // c += a b, b the first or the second 16 x 8 half of the operand.
  MG_BODY void multiply(PerLane<Accumulator>& c, const PerLane<Operand>& a, const PerLane<Operand>& b, int half) const {
    float* v = c.value.v;
    const uint32_t *x = a.value.r, *y = b.value.r + 2 * half;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  }

  template <typename V>
  MG_BODY V load(uint32_t at) const {
    return *reinterpret_cast<const V*>(shared_ + at);
  }
  template <typename V>
  MG_BODY void store(uint32_t at, V value) const {
    *reinterpret_cast<V*>(shared_ + at) = value;
  }

  // *at <- min(*at, value), by any lane of any block.
  MG_BODY void lower(int64_t* at, int64_t value) const {
    atomicMin(reinterpret_cast<long long*>(at), static_cast<long long>(value));
  }

 private:
  char* shared_;
};

class DeviceCta {
 public:
  using Warp = DeviceWarp;
  __device__ explicit DeviceCta(char* shared) : warp_(shared) {}
  __device__ int index() const { return static_cast<int>(blockIdx.x); }
  __device__ int warps() const { return static_cast<int>(blockDim.x) / kLanes; }

  template <typename Body>
  MG_BODY void phase(const Body& body) const {
    body(warp_);
    __syncthreads();
  }

 private:
  DeviceWarp warp_;
};

#else

template <typename V>
struct PerLane {
  V value[kLanes];
  V& operator[](int lane) { return value[lane]; }
  const V& operator[](int lane) const { return value[lane]; }
};

inline uint32_t pack(float low, float high) {
  const _Float16 pair[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t bits;
  __builtin_memcpy(&bits, pair, sizeof bits);
  return bits;
}
inline float unpack(uint16_t bits) {
  _Float16 half;
  __builtin_memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}

// Shared memory that knows who touched each word since the last barrier.
class CheckedShared {
 public:
  explicit CheckedShared(int64_t bytes) : bytes_(bytes), words_((bytes + 1) / 2), data_(words_.size() * 2) {}

  void barrier() { ++phase_; }

  void read(uint32_t at, void* to, uint32_t size, int warp) {
    check(at, size);
    for (uint32_t w = at / 2; w <= (at + size - 1) / 2; ++w) {
      Word& word = words_[w];
      if (!word.written)
        throw std::logic_error("shared memory at " + std::to_string(2 * w) + " is read, never written");
      if (word.write_phase == phase_ && word.writer != warp) race(w, "read", word.writer, warp);
      if (word.read_phase != phase_) word.reader = warp;
      if (word.reader != warp) word.reader = kSeveral;
      word.read_phase = phase_;
    }
    __builtin_memcpy(to, data_.data() + at, size);
  }

  void write(uint32_t at, const void* from, uint32_t size, int warp) {
    check(at, size);
    for (uint32_t w = at / 2; w <= (at + size - 1) / 2; ++w) {
      Word& word = words_[w];
      if (word.write_phase == phase_ && word.writer != warp) race(w, "written", word.writer, warp);
      if (word.read_phase == phase_ && word.reader != warp) race(w, "written", word.reader, warp);
      word = {true, phase_, word.read_phase, warp, word.reader};
    }
    __builtin_memcpy(data_.data() + at, from, size);
  }

 private:
  static constexpr int kSeveral = -2;
  struct Word {
    bool written = false;
    int64_t write_phase = -1, read_phase = -1;
    int writer = -1, reader = -1;
  };

  void check(uint32_t at, uint32_t size) const {
    if (at % size != 0) throw std::logic_error("shared memory at " + std::to_string(at) + " is not aligned");
    if (static_cast<int64_t>(at) + size > bytes_)
      throw std::logic_error("shared memory ends before " + std::to_string(at));
  }
  static void race(uint32_t word, const char* what, int before, int now) {
    throw std::logic_error("race: shared memory at " + std::to_string(2 * word) + " is " + what + " by warp " +
                           std::to_string(now) + " and used by warp " + std::to_string(before) + " in one phase");
  }

  int64_t bytes_;
  std::vector<Word> words_;
  std::vector<unsigned char> data_;
  int64_t phase_ = 0;
};

class HostWarp {
 public:
  HostWarp(CheckedShared& shared, int index) : shared_(shared), index_(index) {}
  int index() const { return index_; }

  template <typename Body>
  void each(const Body& body) const {
    for (int lane = 0; lane < kLanes; ++lane) body(lane);
  }

  template <bool kTransposed>
  void load_matrices(PerLane<Operand>& to, const PerLane<uint32_t>& at) const {
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) shared_.read(at[8 * m + row], matrix[row], 16, index_);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = 2 * (lane % 4);
        const uint16_t low = kTransposed ? matrix[t][g] : matrix[g][t];
        const uint16_t high = kTransposed ? matrix[t + 1][g] : matrix[g][t + 1];
        to[lane].r[m] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  }

  void multiply(PerLane<Accumulator>& c, const PerLane<Operand>& a, const PerLane<Operand>& b, int half) const {
    float left[16][16], right[16][8];
    const auto part = [](uint32_t pair, int i) { return unpack(static_cast<uint16_t>(pair >> 16 * i)); };
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int i = 0; i < 2; ++i) {
        for (int k = 0; k < 2; ++k) {
          left[g][t + i + 8 * k] = part(a[lane].r[2 * k], i);
          left[g + 8][t + i + 8 * k] = part(a[lane].r[2 * k + 1], i);
          right[t + i + 8 * k][g] = part(b[lane].r[2 * half + k], i);
        }
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = c[lane].v[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        c[lane].v[i] = sum;
      }
    }
  }

  template <typename V>
  V load(uint32_t at) const {
    V value;
    shared_.read(at, &value, sizeof value, index_);
    return value;
  }
  template <typename V>
  void store(uint32_t at, V value) const {
    shared_.write(at, &value, sizeof value, index_);
  }

  void lower(int64_t* at, int64_t value) const { *at = std::min(*at, value); }

 private:
  CheckedShared& shared_;
  int index_;
};

// Runs the warps of each phase one after the other, in a new random order each time.
class HostCta {
 public:
  using Warp = HostWarp;
  HostCta(int index, int warps, int64_t shared_bytes, unsigned seed)
      : index_(index), order_(warps), shared_(shared_bytes), random_(seed) {
    for (int w = 0; w < warps; ++w) order_[w] = w;
  }
  int index() const { return index_; }
  int warps() const { return static_cast<int>(order_.size()); }

  template <typename Body>
  void phase(const Body& body) {
    std::shuffle(order_.begin(), order_.end(), random_);
    for (int w : order_) body(HostWarp(shared_, w));
    shared_.barrier();
  }

 private:
  int index_;
  std::vector<int> order_;
  CheckedShared shared_;
  std::mt19937 random_;
};

#endif

}  // namespace mgebm
