// Functions shared by host and device. On the host they are forced inline: each *_cpu.cpp is compiled once per
// instruction set, and an out-of-line copy merged by the linker could run AVX-512 code on a CPU that has none.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MG_HD __host__ __device__ __forceinline__
#define MG_UNROLL _Pragma("unroll")
#define MG_NO_UNROLL _Pragma("unroll 1")
#else
#define MG_UNROLL
#define MG_NO_UNROLL
#define MG_HD static inline __attribute__((always_inline))
#endif

namespace mgebm {

// Fused where fusion is meant; everything else is built with contraction off, so host and device round alike.
MG_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

MG_HD float square_root(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

MG_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

MG_HD uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// A float's bfloat16: to nearest, ties to even; NaN stays one. Without branches, so that it vectorises.
MG_HD uint16_t bfloat_of(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded);
}

}  // namespace mgebm
