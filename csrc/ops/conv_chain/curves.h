// Curved functions with their slopes, a vector at once: those of stacks, and what those of graphs are made of. For
// *_cpu.cpp files only.
#pragma once

#include "mgebm/lanes.h"

namespace mgebm::MGEBM_ISA {

// As many floats as a register of the instruction set holds; arithmetic on them is the compiler's.
#if defined(__AVX512F__)
typedef float Vector __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef float Vector __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
#else
typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
#endif
constexpr int kVectors = static_cast<int>(16 * sizeof(float) / sizeof(Vector));

// a b + c, rounded once where the CPU can.
MG_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
MG_INLINE Vector multiply_add(Vector a, Vector b, float c) { return multiply_add(a, b, c + Vector{}); }

// The bound where x lies outside of it; NaN passes.
MG_INLINE Vector at_least(Vector bound, Vector x) {
#if defined(__AVX512F__)
  return _mm512_max_ps(bound, x);
#elif defined(__AVX2__)
  return _mm256_max_ps(bound, x);
#else
  return x < bound ? bound : x;
#endif
}
MG_INLINE Vector at_most(Vector bound, Vector x) {
#if defined(__AVX512F__)
  return _mm512_min_ps(bound, x);
#elif defined(__AVX2__)
  return _mm256_min_ps(bound, x);
#else
  return x > bound ? bound : x;
#endif
}

// f(z) and f'(z).
template <typename V>
struct Both {
  V value, slope;
};

// e^x as in activation.h.
MG_INLINE Vector exponential(Vector x) {
  x = at_least(-87.0f + Vector{}, x);
  x = at_most(88.0f + Vector{}, x);
  // 3 2^22 added and taken away rounds to the nearest whole number, which the sum's low bits hold.
  const Vector sum = multiply_add(x, 1.44269504f + Vector{}, 12582912.0f), n = sum - 12582912.0f;
  const Vector r = multiply_add(n, 2.12194440e-4f + Vector{}, multiply_add(n, -0.693359375f + Vector{}, x));
  // Pairs of terms at once: a chain of seven would wait for each.
  const Vector square = r * r, high = multiply_add(r, 1.98756915e-4f + Vector{}, 1.39819995e-3f);
  const Vector middle = multiply_add(r, 8.33345192e-3f + Vector{}, 4.16657955e-2f);
  const Vector low = multiply_add(r, 1.66666655e-1f + Vector{}, 5.00000012e-1f);
  const Vector p = multiply_add(multiply_add(multiply_add(high, square, middle), square, low), square, r + 1.0f);
  return p * (Vector)(((Integers)sum << 23) + (127 << 23));
}
// e^x - 1 with e = e^x; near 0 by its series, where the difference would cancel.
MG_INLINE Vector less_one(Vector x, Vector e) {
  Vector p = 1.0f / 720.0f * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  p = p * x + 0.5f;
  p = p * x + 1.0f;
  return x < 0.25f && x > -0.25f ? p * x : e - 1.0f;
}
// 1 / x for x from 1 on, to about a unit in the last place: a division would take longer than all else of a sigmoid.
MG_INLINE Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
  const Vector guess = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(x, guess, _mm512_set1_ps(1.0f)), guess, guess);
#else
  return 1.0f / x;
#endif
}
MG_INLINE Vector sigmoid(Vector z) { return reciprocal(1.0f + exponential(-z)); }

MG_INLINE Both<Vector> silu_both(Vector z) {
  const Vector s = sigmoid(z), v = z * s;
  return {v, s + v * (1.0f - s)};
}
MG_INLINE Both<Vector> elu_both(Vector z, float a, float b) {
  const Vector low = z > 0.0f ? Vector{} : z, e = exponential(low);  // NaN passes
  return {z > 0.0f ? b * z : b * (a * less_one(low, e)), z > 0.0f ? b + Vector{} : b * (a * e)};
}

// body of sixteen numbers, the bits of one vector after the other.
template <typename Body>
MG_INLINE Both<F16> both_of(F16 z, const Body& body) {
  Vector v[kVectors], d[kVectors];
  __builtin_memcpy(v, &z, sizeof v);
  for (int i = 0; i < kVectors; ++i) {
    const Both<Vector> both = body(v[i]);
    v[i] = both.value, d[i] = both.slope;
  }
  Both<F16> out;
  __builtin_memcpy(&out.value, v, sizeof v);
  __builtin_memcpy(&out.slope, d, sizeof d);
  return out;
}
MG_INLINE Both<F16> silu_both(F16 z) {
  return both_of(z, [](Vector v) __attribute__((always_inline)) { return silu_both(v); });
}
MG_INLINE Both<F16> elu_both(F16 z, float a, float b) {
  return both_of(z, [=](Vector v) __attribute__((always_inline)) { return elu_both(v, a, b); });
}

}  // namespace mgebm::MGEBM_ISA
