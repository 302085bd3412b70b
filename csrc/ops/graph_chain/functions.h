// The functions of a graph's layers with their slopes, sixteen lanes at once. For *_cpu.cpp files only.
#pragma once

#include "ops/conv_chain/activation.h"
#include "ops/graph_chain/graph_chain.h"

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
MG_INLINE Vector hyperbolic_tangent(Vector z) {
  const Vector m = less_one(2.0f * z, exponential(2.0f * z));
  return m / (m + 2.0f);
}

MG_INLINE Both<Vector> silu_both(Vector z) {
  const Vector s = sigmoid(z), v = z * s;
  return {v, s + v * (1.0f - s)};
}
// Of sixteen numbers, the same bits.
MG_INLINE Both<F16> silu_both(F16 z) {
  Vector v[kVectors], d[kVectors];
  __builtin_memcpy(v, &z, sizeof v);
  for (int i = 0; i < kVectors; ++i) {
    const Both<Vector> both = silu_both(v[i]);
    v[i] = both.value, d[i] = both.slope;
  }
  Both<F16> out;
  __builtin_memcpy(&out.value, v, sizeof v);
  __builtin_memcpy(&out.slope, d, sizeof d);
  return out;
}
MG_INLINE Both<Vector> elu_both(Vector z, float a, float b) {
  const Vector low = z < 0.0f ? z : Vector{}, e = exponential(low);
  return {z > 0.0f ? b * z : b * (a * less_one(low, e)), z > 0.0f ? b + Vector{} : b * (a * e)};
}

// z Phi(z), Phi by Abramowitz and Stegun 7.1.26 to 1e-7; the density's exponential serves both.
MG_INLINE Both<Vector> gelu_both(Vector z) {
  const Vector x = (z < 0.0f ? -z : z) * 0.707106781f, e = exponential(-0.5f * z * z);
  const Vector t = 1.0f / (1.0f + 0.3275911f * x);
  Vector p = 1.061405429f * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vector tail = 0.5f * p * t * e, below = z < 0.0f ? tail : 1.0f - tail;
  return {z * below, below + z * 0.398942280f * e};
}
MG_INLINE Both<Vector> gelu_tanh_both(Vector z) {
  constexpr float kScale = 0.797884561f, kCube = 0.044715f;
  const Vector t = hyperbolic_tangent(kScale * (z + kCube * z * z * z));
  return {0.5f * z * (1.0f + t),
          0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * kScale * (1.0f + 3.0f * kCube * z * z)};
}
MG_INLINE Both<Vector> tanh_both(Vector z) {
  const Vector t = hyperbolic_tangent(z);
  return {t, 1.0f - t * t};
}
MG_INLINE Both<Vector> sigmoid_both(Vector z) {
  const Vector s = sigmoid(z);
  return {s, s * (1.0f - s)};
}
// tanh(log(1 + e^z)) = (e^2z + 2 e^z) / (e^2z + 2 e^z + 2); from 20 on it is 1.
MG_INLINE Both<Vector> mish_both(Vector z) {
  const Vector e = exponential(z < 20.0f ? z : 20.0f + Vector{}), n = e * (e + 2.0f), t = n / (n + 2.0f);
  return {z * t, t + z * (1.0f - t * t) * (e / (1.0f + e))};
}

// log(1 + e^z) = max(z, 0) + log(1 + e^-|z|), the logarithm of a number in (1, 2].
MG_INLINE Both<float> softplus_both(float z, float a, float b) {
  const float y = a * z, e = exponential(y > 0.0f ? -y : y);
  // Below 2^-12 its series is exact where 1 + e rounds.
  const float log1p = e < 0x1p-12f ? e * (1.0f - 0.5f * e) : log_of(0.5f + 0.5f * e) + 0.693147182f;
  const float r = 1.0f / (1.0f + e), value = ((y > 0.0f ? y : 0.0f) + log1p) / a;
  return {y > b ? z : value, y > b ? 1.0f : (y > 0.0f ? r : e * r)};
}
MG_INLINE float power(float z, int n) {
  float out = 1.0f;
  for (int i = n < 0 ? -n : n; i > 0; --i) out *= z;
  return n < 0 ? 1.0f / out : out;
}

// value[i], slope[i] <- body(z[i]) a vector at a time; `count` is a multiple of sixteen, value may be z.
template <typename Body>
MG_INLINE void vectors(const float* z, float* value, float* slope, int64_t count, const Body& body) {
  constexpr int kLanes = sizeof(Vector) / sizeof(float);
  for (int64_t i = 0; i < count; i += kLanes) {
    Vector v;
    __builtin_memcpy(&v, z + i, sizeof v);
    const Both<Vector> both = body(v);
    __builtin_memcpy(value + i, &both.value, sizeof v);
    __builtin_memcpy(slope + i, &both.slope, sizeof v);
  }
}

// The same, body(a number) -> Both<float>
template <typename Body>
MG_INLINE void lanes(const float* z, float* value, float* slope, int64_t count, const Body& body) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Both<float> both = body(z[i]);
    value[i] = both.value, slope[i] = both.slope;
  }
}

// f(z) into `value` and f'(z) into `slope`, for a multiple of sixteen numbers; value may be z.
static void values_and_slopes(const GraphStep& s, const float* z, float* value, float* slope, int64_t count) {
  const float a = s.a, b = s.b;
  const auto by_vectors = [=](auto body) { vectors(z, value, slope, count, body); };
  const auto by_lanes = [=](auto body) { lanes(z, value, slope, count, body); };
  switch (s.function) {
    case Function::kNone:
      return by_vectors([](Vector v) { return Both<Vector>{v, 1.0f + Vector{}}; });
    case Function::kLeaky:
    case Function::kAnyLeaky:
      return by_vectors([=](Vector v) {
        const Vector low = a == 0.0f ? Vector{} : v * a;
        return Both<Vector>{v > 0.0f ? v : low, v > 0.0f ? 1.0f + Vector{} : a + Vector{}};
      });
    case Function::kSilu:
      return by_vectors([](Vector v) { return silu_both(v); });
    case Function::kElu:
      return by_vectors([=](Vector v) { return elu_both(v, a, b); });
    case Function::kGelu:
      return by_vectors([](Vector v) { return gelu_both(v); });
    case Function::kGeluTanh:
      return by_vectors([](Vector v) { return gelu_tanh_both(v); });
    case Function::kSoftplus:
      return by_lanes([=](float v) { return softplus_both(v, a, b); });
    case Function::kTanh:
      return by_vectors([](Vector v) { return tanh_both(v); });
    case Function::kSigmoid:
      return by_vectors([](Vector v) { return sigmoid_both(v); });
    case Function::kMish:
      return by_vectors([](Vector v) { return mish_both(v); });
    case Function::kAbs:
      return by_lanes([](float v) { return Both<float>{v < 0.0f ? -v : v, v > 0.0f ? 1.0f : (v < 0.0f ? -1.0f : v)}; });
    case Function::kPower:
      if (a == 2.0f) return by_vectors([](Vector v) { return Both<Vector>{v * v, v + v}; });
      return by_lanes([=](float v) {
        const int n = static_cast<int>(a);
        return Both<float>{power(v, n), n == 0 ? 0.0f : a * power(v, n - 1)};
      });
    case Function::kClamp:
      return by_lanes(
          [=](float v) { return Both<float>{v < a ? a : (v > b ? b : v), v >= a && v <= b ? 1.0f : 0.0f}; });
    case Function::kHardTanh:
      return by_lanes([=](float v) { return Both<float>{v < a ? a : (v > b ? b : v), v > a && v < b ? 1.0f : 0.0f}; });
    case Function::kExp:
      return by_lanes([](float v) {
        const float e = __builtin_expf(v);
        return Both<float>{e, e};
      });
    case Function::kLog:
      return by_lanes([](float v) { return Both<float>{__builtin_logf(v), 1.0f / v}; });
    case Function::kSin:
      return by_lanes([](float v) { return Both<float>{__builtin_sinf(v), __builtin_cosf(v)}; });
    case Function::kCos:
      return by_lanes([](float v) { return Both<float>{__builtin_cosf(v), -__builtin_sinf(v)}; });
    case Function::kStep:
      return by_lanes([=](float v) { return Both<float>{v > a || (b != 0.0f && v == a) ? 1.0f : 0.0f, 0.0f}; });
    case Function::kErf:
      return by_lanes([](float v) { return Both<float>{__builtin_erff(v), 1.12837917f * __builtin_expf(-v * v)}; });
    case Function::kArctan:
      return by_lanes([](float v) { return Both<float>{__builtin_atanf(v), 1.0f / (1.0f + v * v)}; });
    case Function::kRealPower:
      return by_lanes([=](float v) { return Both<float>{__builtin_powf(v, a), a * __builtin_powf(v, a - 1.0f)}; });
    default:
      return by_lanes([zero = s.function == Function::kRoot](float v) {
        const float root = __builtin_sqrtf(v);
        return Both<float>{root, zero && root == 0.0f ? 0.0f : 0.5f / root};
      });
  }
}

}  // namespace mgebm::MGEBM_ISA
