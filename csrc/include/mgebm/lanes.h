// Sixteen float lanes on any CPU, and 16-bit masks over them. For *_cpu.cpp files only.
#pragma once

#include "macros.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mgebm::MGEBM_ISA {

#define MG_INLINE static inline __attribute__((always_inline))
// For members of a class, which cannot be `static` functions of the file.
#define MG_METHOD inline __attribute__((always_inline))

struct Bf16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

struct F16 {
  __m512 v;
};
MG_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
MG_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
MG_INLINE F16 all(float a) { return {_mm512_set1_ps(a)}; }
MG_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
MG_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
MG_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
MG_INLINE F16 multiply_add(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
MG_INLINE uint16_t positive(F16 a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ); }
MG_INLINE F16 select(uint16_t mask, F16 yes, F16 no) { return {_mm512_mask_blend_ps(mask, no.v, yes.v)}; }

#elif defined(__AVX2__)

struct F16 {
  __m256 v, w;
};
MG_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MG_INLINE void store(float* p, F16 a) { _mm256_storeu_ps(p, a.v), _mm256_storeu_ps(p + 8, a.w); }
MG_INLINE F16 all(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
MG_INLINE F16 operator+(F16 a, F16 b) { return {_mm256_add_ps(a.v, b.v), _mm256_add_ps(a.w, b.w)}; }
MG_INLINE F16 operator-(F16 a, F16 b) { return {_mm256_sub_ps(a.v, b.v), _mm256_sub_ps(a.w, b.w)}; }
MG_INLINE F16 operator*(F16 a, F16 b) { return {_mm256_mul_ps(a.v, b.v), _mm256_mul_ps(a.w, b.w)}; }
MG_INLINE F16 multiply_add(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v), _mm256_fmadd_ps(a.w, b.w, c.w)};
}
MG_INLINE uint16_t positive(F16 a) {
  const __m256 zero = _mm256_setzero_ps();
  return static_cast<uint16_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, zero, _CMP_GT_OQ)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.w, zero, _CMP_GT_OQ)) << 8);
}
MG_INLINE F16 select(uint16_t mask, F16 yes, F16 no) {
  const __m256i bits = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  const __m256i low = _mm256_and_si256(_mm256_set1_epi32(mask & 255), bits);
  const __m256i high = _mm256_and_si256(_mm256_set1_epi32(mask >> 8), bits);
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(low, bits))),
          _mm256_blendv_ps(no.w, yes.w, _mm256_castsi256_ps(_mm256_cmpeq_epi32(high, bits)))};
}

#else

struct F16 {
  float v[16];
};
#define MG_EACH(expression)                           \
  F16 out;                                            \
  for (int i = 0; i < 16; ++i) out.v[i] = expression; \
  return out
MG_INLINE F16 load(const float* p) { MG_EACH(p[i]); }
MG_INLINE void store(float* p, F16 a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
MG_INLINE F16 all(float a) { MG_EACH(a); }
MG_INLINE F16 operator+(F16 a, F16 b) { MG_EACH(a.v[i] + b.v[i]); }
MG_INLINE F16 operator-(F16 a, F16 b) { MG_EACH(a.v[i] - b.v[i]); }
MG_INLINE F16 operator*(F16 a, F16 b) { MG_EACH(a.v[i] * b.v[i]); }
// Where the CPU has no fused multiply-add, libm's fmaf would be far too slow: product and sum are rounded separately.
MG_INLINE F16 multiply_add(F16 a, F16 b, F16 c) { MG_EACH(a.v[i] * b.v[i] + c.v[i]); }
MG_INLINE uint16_t positive(F16 a) {
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint16_t>((a.v[i] > 0.0f) << i);
  return mask;
}
MG_INLINE F16 select(uint16_t mask, F16 yes, F16 no) { MG_EACH(mask >> i & 1 ? yes.v[i] : no.v[i]); }
#undef MG_EACH

#endif

#if defined(__AVX512BF16__)
MG_INLINE F16 load(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
MG_INLINE void store(Bf16* p, F16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
// What a is rounded to, and what that leaves of it.
MG_INLINE void store_halves(Bf16* high, Bf16* low, F16 a) {
  const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), bits);
  store(low, a - F16{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))});
}
// p[2 i] <- a[i], p[2 i + 1] <- b[i]
MG_INLINE void store_pairs(Bf16* p, F16 a, F16 b) {
  const __m512i even = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
  const __m512i odd = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b.v)));
  _mm512_storeu_si512(p, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}
#else
MG_INLINE F16 load(const Bf16* p) {
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = as_float(static_cast<uint32_t>(p[i].bits) << 16);
  return load(v);
}
MG_INLINE void store(Bf16* p, F16 a) {
  float v[16];
  store(v, a);
  for (int i = 0; i < 16; ++i) p[i].bits = bfloat_of(v[i]);
}
MG_INLINE void store_halves(Bf16* high, Bf16* low, F16 a) {
  store(high, a);
  store(low, a - load(high));
}
MG_INLINE void store_pairs(Bf16* p, F16 a, F16 b) {
  float even[16], odd[16];
  store(even, a), store(odd, b);
  for (int i = 0; i < 16; ++i) p[2 * i].bits = bfloat_of(even[i]), p[2 * i + 1].bits = bfloat_of(odd[i]);
}
#endif

// out[j][i] <- in[i * stride + j]
MG_INLINE void transpose(const float* in, int stride, float (*out)[16]) {
#if defined(__AVX512F__)
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * stride);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // r[4 i + j] holds, in its four 128-bit parts p, column 4 p + j of rows 4 i ... 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x44), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x44);
    const __m512 c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xEE), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xEE);
    _mm512_store_ps(out[j], _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_store_ps(out[4 + j], _mm512_shuffle_f32x4(a, b, 0xDD));
    _mm512_store_ps(out[8 + j], _mm512_shuffle_f32x4(c, d, 0x88));
    _mm512_store_ps(out[12 + j], _mm512_shuffle_f32x4(c, d, 0xDD));
  }
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) out[j][i] = in[i * stride + j];
  }
#endif
}

}  // namespace mgebm::MGEBM_ISA
