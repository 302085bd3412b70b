// The ops, a line each: X(name, params struct, layers). Declarations, the choice of instruction set (dispatch.cpp) and
// the Python functions (bindings.cpp) are made from these lines; setup.py compiles what stands under ops/.
//
// Each *_cpu.cpp is compiled once per instruction set into a namespace of its own, and dispatch.cpp picks one when the
// program runs. Those files use no standard-library templates: a merged copy could carry the wrong one.
#pragma once

#include "ops/conv_chain/conv_chain.h"
#include "ops/conv_chain/resident_params.h"
#include "ops/conv_learn/conv_learn.h"
#include "ops/graph_chain/graph_chain.h"
#include "ops/langevin_step.h"
#include "ops/noise.h"
#include "ops/pyramid.h"
#include "ops/upsample.h"

// layers: CPU, or CPU_AND_CUDA
#define MGEBM_FLOAT_OPS(X)                           \
  X(noise, NoiseParams, CPU_AND_CUDA)                \
  X(langevin_step, LangevinStepParams, CPU_AND_CUDA) \
  X(pyramid, PyramidParams, CPU_AND_CUDA)            \
  X(upsample, UpsampleParams, CPU_AND_CUDA)
// Ops compiled also for the instruction sets that multiply bfloat16.
#define MGEBM_BFLOAT_OPS(X)             \
  X(conv_chain, ConvChainParams, CPU)   \
  X(graph_chain, GraphChainParams, CPU) \
  X(conv_learn, ConvLearnParams, CPU)
// Ops whose params on a GPU are other than those on a CPU.
#define MGEBM_RESIDENT_OPS(X) X(conv_chain, ResidentParams, CPU_AND_CUDA)
#define MGEBM_OPS(X) MGEBM_FLOAT_OPS(X) MGEBM_BFLOAT_OPS(X)
// Ops that need scratch memory: <op>_workspace says how many bytes.
#define MGEBM_WORKSPACES(X)        \
  X(conv_chain, ConvChainParams)   \
  X(graph_chain, GraphChainParams) \
  X(conv_learn, ConvLearnParams)

namespace mgebm {

#define MGEBM_DECLARE(op, Params, layers) void op##_cpu(const Params& params, int threads);
#define MGEBM_DECLARE_WORKSPACE(op, Params) int64_t op##_workspace(const Params& params, int threads);
#define MGEBM_DECLARE_SET(isa)              \
  namespace isa {                           \
  MGEBM_OPS(MGEBM_DECLARE)                  \
  MGEBM_WORKSPACES(MGEBM_DECLARE_WORKSPACE) \
  }
// The bfloat16 sets have chains and a learning step of their own; their other ops are those of AVX-512.
#define MGEBM_USE(op, Params, layers) using avx512::op##_cpu;
#define MGEBM_DECLARE_BFLOAT_SET(isa)       \
  namespace isa {                           \
  MGEBM_FLOAT_OPS(MGEBM_USE)                \
  MGEBM_BFLOAT_OPS(MGEBM_DECLARE)           \
  MGEBM_WORKSPACES(MGEBM_DECLARE_WORKSPACE) \
  }

MGEBM_DECLARE_SET(portable)
#if defined(MGEBM_X86)
MGEBM_DECLARE_SET(avx2)
MGEBM_DECLARE_SET(avx512)
#endif
#if defined(MGEBM_BFLOAT)
MGEBM_DECLARE_BFLOAT_SET(avx512bf16)
MGEBM_DECLARE_BFLOAT_SET(amx)
#endif

// The functions that run the instruction set in use.
MGEBM_OPS(MGEBM_DECLARE)
MGEBM_WORKSPACES(MGEBM_DECLARE_WORKSPACE)
#undef MGEBM_DECLARE_BFLOAT_SET
#undef MGEBM_USE
#undef MGEBM_DECLARE_SET
#undef MGEBM_DECLARE_WORKSPACE
#undef MGEBM_DECLARE

// The launchers return the CUDA error code, 0 on success.
#define MGEBM_CUDA_CPU(op, Params)
#define MGEBM_CUDA_CPU_AND_CUDA(op, Params) int op##_cuda(const Params& params, int device, void* stream);
#define MGEBM_DECLARE_CUDA(op, Params, layers) MGEBM_CUDA_##layers(op, Params)
MGEBM_OPS(MGEBM_DECLARE_CUDA)
MGEBM_RESIDENT_OPS(MGEBM_DECLARE_CUDA)
#undef MGEBM_DECLARE_CUDA
#undef MGEBM_CUDA_CPU_AND_CUDA
#undef MGEBM_CUDA_CPU

}  // namespace mgebm
