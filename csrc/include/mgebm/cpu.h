// What every C++ loop needs: how many threads pay, and arithmetic that does not depend on how a thread was set up.
// For *_cpu.cpp files only.
#pragma once

#include "macros.h"

namespace mgebm::MGEBM_ISA {

constexpr int64_t kAlign = 64;  // bytes of a cache line
static inline int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Below this many elements, starting threads costs more than the work itself.
constexpr int64_t kGrainElements = 16384;

static inline int threads_for(int64_t elements, int threads) {
  const int64_t useful = 1 + elements / kGrainElements;
  return useful < threads ? static_cast<int>(useful) : threads;
}

// While one lives, its thread keeps subnormal numbers, as IEEE 754 has it. torch.set_flush_denormal sets the calling
// thread alone: results would depend on which thread computed them. One at the start of every parallel region.
class KeepSubnormals {
 public:
#if defined(__x86_64__) || defined(__i386__)
  KeepSubnormals() {
    asm volatile("stmxcsr %0" : "=m"(before_));
    set(before_ & ~kFlush);
  }
  ~KeepSubnormals() { set(before_); }

 private:
  static constexpr uint32_t kFlush = 0x8040;  // results to zero, and operands
  void set(uint32_t control) {
    if (before_ & kFlush) asm volatile("ldmxcsr %0" : : "m"(control) : "memory");
  }
  uint32_t before_;
#elif defined(__aarch64__)
  KeepSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    set(before_ & ~kFlush);
  }
  ~KeepSubnormals() { set(before_); }

 private:
  static constexpr uint64_t kFlush = 1 << 24;
  void set(uint64_t control) {
    if (before_ & kFlush) asm volatile("msr fpcr, %0" : : "r"(control) : "memory");
  }
  uint64_t before_;
#else
  KeepSubnormals() {}
  ~KeepSubnormals() {}
#endif
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;
};

}  // namespace mgebm::MGEBM_ISA
