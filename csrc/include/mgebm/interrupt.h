// How a long op answers Ctrl-C.
#pragma once

#include <time.h>

#include "macros.h"

namespace mgebm {

// Whether a Python signal handler raised; to be asked by the thread that called the op. Null outside Python.
extern bool (*interrupted)();

#if defined(MGEBM_ISA)
namespace MGEBM_ISA {

// Shared by the threads of a call: the calling one polls, all check `asked` between pieces of work and stop when it is
// set.
class Interrupt {
 public:
  bool asked() const { return __atomic_load_n(&asked_, __ATOMIC_RELAXED); }

  // Whether Python's signal handlers had their turn: they may have used the tile registers.
  bool poll() {
    if (!interrupted || asked()) return false;
    const int64_t time = now();
    if (time - last_ < kIntervalNanoseconds) return false;
    last_ = time;
    if (interrupted()) __atomic_store_n(&asked_, true, __ATOMIC_RELAXED);
    return true;
  }

 private:
  static constexpr int64_t kIntervalNanoseconds = 50'000'000;
  // The coarse clock costs a few nanoseconds.
  static int64_t now() {
#if defined(CLOCK_MONOTONIC_COARSE)
    constexpr clockid_t kClock = CLOCK_MONOTONIC_COARSE;
#else
    constexpr clockid_t kClock = CLOCK_MONOTONIC;
#endif
    timespec time;
    clock_gettime(kClock, &time);
    return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
  }
  bool asked_ = false;
  int64_t last_ = now();
};

}  // namespace MGEBM_ISA
#endif

}  // namespace mgebm
