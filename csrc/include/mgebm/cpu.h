// The C++ loops: each *_cpu.cpp is compiled once per instruction set into a namespace of its own, and dispatch.cpp
// picks one when the program runs. Those files use no standard-library templates: a merged copy could carry the wrong
// one.
#pragma once

#include "ops/conv_chain.h"
#include "ops/langevin_step.h"
#include "ops/noise.h"
#include "ops/pyramid.h"
#include "ops/upsample.h"

namespace mgebm {

#define MGEBM_DECLARE_CONV(isa)                                             \
  namespace isa {                                                           \
  int64_t conv_chain_workspace(const ConvChainParams& params, int threads); \
  void conv_chain_cpu(const ConvChainParams& params, int threads);          \
  }

#define MGEBM_DECLARE_CPU(isa)                                           \
  MGEBM_DECLARE_CONV(isa)                                                \
  namespace isa {                                                        \
  void noise_cpu(const NoiseParams& params, int threads);                \
  void langevin_step_cpu(const LangevinStepParams& params, int threads); \
  void pyramid_cpu(const PyramidParams& params, int threads);            \
  void upsample_cpu(const UpsampleParams& params, int threads);          \
  }

MGEBM_DECLARE_CPU(portable)
#if defined(MGEBM_X86)
MGEBM_DECLARE_CPU(avx2)
MGEBM_DECLARE_CPU(avx512)
#endif
#if defined(MGEBM_BFLOAT)
MGEBM_DECLARE_CONV(avx512bf16)
MGEBM_DECLARE_CONV(amx)
#endif
#undef MGEBM_DECLARE_CPU
#undef MGEBM_DECLARE_CONV

// The set in use: "amx", "avx512bf16", "avx512", "avx2" or "portable".
const char* isa_name();
// The sets of this build, fastest first; null past the last.
const char* isa_built(int index);
// Whether it multiplies bfloat16, as conv_chain can then.
bool isa_has_bfloat();
// Whether it then is faster than float32.
bool isa_prefers_bfloat();
// Takes "auto" or a name; returns false and changes nothing when this CPU or this build has no such set.
bool set_isa(const char* name);

void noise_cpu(const NoiseParams& params, int threads);
void langevin_step_cpu(const LangevinStepParams& params, int threads);
void pyramid_cpu(const PyramidParams& params, int threads);
void upsample_cpu(const UpsampleParams& params, int threads);
void conv_chain_cpu(const ConvChainParams& params, int threads);
// Bytes that it needs, under the set in use.
int64_t conv_chain_workspace(const ConvChainParams& params, int threads);

// Starting threads costs more than this many elements of work do.
constexpr int64_t kGrainElements = 16384;

static inline int threads_for(int64_t elements, int threads) {
  const int64_t useful = 1 + elements / kGrainElements;
  return useful < threads ? static_cast<int>(useful) : threads;
}

}  // namespace mgebm
