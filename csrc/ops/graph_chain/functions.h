// The functions of a graph's layers with their slopes, sixteen lanes at once. For *_cpu.cpp files only.
#pragma once

#include "ops/conv_chain/activation.h"
#include "ops/graph_chain/graph_chain.h"

namespace mgebm::MGEBM_ISA {

MG_INLINE Vector hyperbolic_tangent(Vector z) {
  const Vector m = less_one(2.0f * z, exponential(2.0f * z));
  return m / (m + 2.0f);
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
// e^x over all of float's range: 2^n as two factors, since n may be 128, or so small that one is no normal number.
MG_INLINE float exp_of(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const int32_t n = static_cast<int32_t>(x * 1.44269504f + (x < 0.0f ? -0.5f : 0.5f)), half = n >> 1;
  const float m = static_cast<float>(n), p = exponential_of_rest((x - m * 0.693359375f) + m * 2.12194440e-4f);
  return p * as_float(static_cast<uint32_t>(half + 127) << 23) * as_float(static_cast<uint32_t>(n - half + 127) << 23);
}
// ln x: -inf at 0, NaN below.
MG_INLINE float natural_log(float x) {
  const bool subnormal = x < 0x1p-126f;
  const float v = log_of(subnormal ? x * 0x1p23f : x) - (subnormal ? 15.9423847f : 0.0f);
  const float above = x > 3.40282347e38f ? x : v;
  return x > 0.0f ? above : (x == 0.0f ? -__builtin_inff() : __builtin_nanf(""));
}
constexpr float kMostTurned = 8192.0f;
// sin x and cos x for |x| <= kMostTurned: less quarter turns k pi/2, in three parts of which k times the first two are
// exact; then the polynomials of Cephes.
MG_INLINE Both<float> sine_and_cosine(float x) {
  const int32_t k = static_cast<int32_t>(x * 0.636619772f + (x < 0.0f ? -0.5f : 0.5f));
  const float q = static_cast<float>(k);
  const float r = ((x - q * 1.5703125f) - q * 4.837512969970703125e-4f) - q * 7.54978995489188216e-8f, s = r * r;
  const float sine = r + r * s * ((-1.9515295891e-4f * s + 8.3321608736e-3f) * s - 1.6666654611e-1f);
  const float cosine =
      (1.0f - 0.5f * s) + s * s * ((2.443315711809948e-5f * s - 1.388731625493765e-3f) * s + 4.166664568298827e-2f);
  const uint32_t turn = static_cast<uint32_t>(k);
  const uint32_t first = as_bits(turn & 1u ? cosine : sine) ^ ((turn & 2u) << 30);
  const uint32_t second = as_bits(turn & 1u ? sine : cosine) ^ (((turn + 1u) & 2u) << 30);
  return {as_float(first), as_float(second)};
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

// Where one number of a run of a sample is outside of it, libm takes the run: a number may differ by an ulp beside
// such.
MG_INLINE bool within(const float* z, int64_t count, float bound) {
  int outside = 0;
#pragma omp simd reduction(| : outside)
  for (int64_t i = 0; i < count; ++i) outside |= !(z[i] <= bound && z[i] >= -bound);
  return outside == 0;
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
        const float e = exp_of(v);
        return Both<float>{e, e};
      });
    case Function::kLog:
      return by_lanes([](float v) { return Both<float>{natural_log(v), 1.0f / v}; });
    case Function::kSin:
      if (!within(z, count, kMostTurned)) {
        return by_lanes([](float v) { return Both<float>{__builtin_sinf(v), __builtin_cosf(v)}; });
      }
      return by_lanes([](float v) { return sine_and_cosine(v); });
    case Function::kCos:
      if (!within(z, count, kMostTurned)) {
        return by_lanes([](float v) { return Both<float>{__builtin_cosf(v), -__builtin_sinf(v)}; });
      }
      return by_lanes([](float v) {
        const Both<float> both = sine_and_cosine(v);
        return Both<float>{both.slope, -both.value};
      });
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
