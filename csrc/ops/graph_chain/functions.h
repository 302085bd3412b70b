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

// f(z) and f'(z).
template <typename V>
struct Both {
  V value, slope;
};

// e^x as in activation.h.
MG_INLINE Vector exponential(Vector x) {
  x = x < -87.0f ? -87.0f + Vector{} : x;
  x = x > 88.0f ? 88.0f + Vector{} : x;
  const Vector half = x < 0.0f ? -0.5f + Vector{} : 0.5f + Vector{};
  const Integers whole = __builtin_convertvector(x * 1.44269504f + half, Integers);
  const Vector n = __builtin_convertvector(whole, Vector);
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = 1.98756915e-4f * r + 1.39819995e-3f;
  p = p * r + 8.33345192e-3f;
  p = p * r + 4.16657955e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Vector)((whole + 127) << 23);
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
MG_INLINE Vector sigmoid(Vector z) { return 1.0f / (1.0f + exponential(-z)); }
MG_INLINE Vector hyperbolic_tangent(Vector z) {
  const Vector m = less_one(2.0f * z, exponential(2.0f * z));
  return m / (m + 2.0f);
}

MG_INLINE Both<Vector> silu_both(Vector z) {
  const Vector s = sigmoid(z), v = z * s;
  return {v, s + v * (1.0f - s)};
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

// body(a vector) -> Both<Vector>
template <typename Body>
MG_INLINE F16 vectors(F16 z, F16* slope, const Body& body) {
  Vector part[kVectors], d[kVectors];
  __builtin_memcpy(part, &z, sizeof z);
  for (int i = 0; i < kVectors; ++i) {
    const Both<Vector> both = body(part[i]);
    part[i] = both.value, d[i] = both.slope;
  }
  __builtin_memcpy(slope, d, sizeof d);
  __builtin_memcpy(&z, part, sizeof part);
  return z;
}

// body(a number) -> Both<float>
template <typename Body>
MG_INLINE F16 lanes(F16 z, F16* slope, const Body& body) {
  alignas(64) float v[16], d[16];
  store(v, z);
#pragma omp simd
  for (int i = 0; i < 16; ++i) {
    const Both<float> both = body(v[i]);
    v[i] = both.value, d[i] = both.slope;
  }
  *slope = load(d);
  return load(v);
}

// f(z), and f'(z) into `slope`.
static inline F16 value_and_slope(const GraphStep& s, F16 z, F16* slope) {
  const float a = s.a, b = s.b;
  switch (s.function) {
    case Function::kNone:
      *slope = all(1.0f);
      return z;
    case Function::kLeaky:
    case Function::kAnyLeaky:
      *slope = select(positive(z), all(1.0f), all(a));
      return select(positive(z), z, a == 0.0f ? all(0.0f) : z * all(a));
    case Function::kSilu:
      return vectors(z, slope, [](Vector v) { return silu_both(v); });
    case Function::kElu:
      return vectors(z, slope, [=](Vector v) { return elu_both(v, a, b); });
    case Function::kGelu:
      return vectors(z, slope, [](Vector v) { return gelu_both(v); });
    case Function::kGeluTanh:
      return vectors(z, slope, [](Vector v) { return gelu_tanh_both(v); });
    case Function::kSoftplus:
      return lanes(z, slope, [=](float v) { return softplus_both(v, a, b); });
    case Function::kTanh:
      return vectors(z, slope, [](Vector v) { return tanh_both(v); });
    case Function::kSigmoid:
      return vectors(z, slope, [](Vector v) { return sigmoid_both(v); });
    case Function::kMish:
      return vectors(z, slope, [](Vector v) { return mish_both(v); });
    case Function::kAbs:
      return lanes(z, slope,
                   [](float v) { return Both<float>{v < 0.0f ? -v : v, v > 0.0f ? 1.0f : (v < 0.0f ? -1.0f : v)}; });
    case Function::kPower:
      if (a == 2.0f) {
        *slope = z + z;
        return z * z;
      }
      return lanes(z, slope, [=](float v) {
        const int n = static_cast<int>(a);
        return Both<float>{power(v, n), n == 0 ? 0.0f : a * power(v, n - 1)};
      });
    case Function::kClamp:
      return lanes(z, slope,
                   [=](float v) { return Both<float>{v < a ? a : (v > b ? b : v), v >= a && v <= b ? 1.0f : 0.0f}; });
    case Function::kHardTanh:
      return lanes(z, slope,
                   [=](float v) { return Both<float>{v < a ? a : (v > b ? b : v), v > a && v < b ? 1.0f : 0.0f}; });
    case Function::kExp:
      return lanes(z, slope, [](float v) {
        const float e = __builtin_expf(v);
        return Both<float>{e, e};
      });
    case Function::kLog:
      return lanes(z, slope, [](float v) { return Both<float>{__builtin_logf(v), 1.0f / v}; });
    case Function::kSin:
      return lanes(z, slope, [](float v) { return Both<float>{__builtin_sinf(v), __builtin_cosf(v)}; });
    case Function::kCos:
      return lanes(z, slope, [](float v) { return Both<float>{__builtin_cosf(v), -__builtin_sinf(v)}; });
    case Function::kStep:
      return lanes(z, slope, [=](float v) { return Both<float>{v > a || (b != 0.0f && v == a) ? 1.0f : 0.0f, 0.0f}; });
    case Function::kErf:
      return lanes(z, slope,
                   [](float v) { return Both<float>{__builtin_erff(v), 1.12837917f * __builtin_expf(-v * v)}; });
    case Function::kArctan:
      return lanes(z, slope, [](float v) { return Both<float>{__builtin_atanf(v), 1.0f / (1.0f + v * v)}; });
    case Function::kRealPower:
      return lanes(z, slope,
                   [=](float v) { return Both<float>{__builtin_powf(v, a), a * __builtin_powf(v, a - 1.0f)}; });
    default:
      return lanes(z, slope, [zero = s.function == Function::kRoot](float v) {
        const float root = __builtin_sqrtf(v);
        return Both<float>{root, zero && root == 0.0f ? 0.0f : 0.5f / root};
      });
  }
}

}  // namespace mgebm::MGEBM_ISA
