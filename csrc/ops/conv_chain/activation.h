// Activations of sixteen lanes, and their slopes. For *_cpu.cpp files only.
#pragma once

#include "mgebm/lanes.h"
#include "ops/conv_chain/conv_chain.h"
#include "ops/conv_chain/curves.h"

namespace mgebm::MGEBM_ISA {

// e^r for |r| <= ln(2) / 2, to about 1e-7 of its value; our own polynomial, so that it vectorises on every CPU.
MG_INLINE float exponential_of_rest(float r) {
  float p = 1.98756915e-4f;
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345192e-3f;
  p = p * r + 4.16657955e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  return p * r * r + r + 1.0f;
}
MG_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = static_cast<float>(static_cast<int32_t>(x * 1.44269504f + (x < 0.0f ? -0.5f : 0.5f)));
  const float p = exponential_of_rest((x - n * 0.693359375f) + n * 2.12194440e-4f);
  return p * as_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// Whether the slope needs z itself, and not its sign alone.
MG_INLINE bool curved(Activation activation) {
  return activation == Activation::kSilu || activation == Activation::kElu;
}
// a(z) and a'(z) of such a one.
MG_INLINE Both<F16> curve(Activation activation, F16 z) {
  return activation == Activation::kSilu ? silu_both(z) : elu_both(z, 1.0f, 1.0f);
}

// The slope of a leaky ReLU, held in registers: a loop that stores would read it from the stage each time, which it
// could change for all that a compiler knows.
struct Leaky {
  F16 slope;
  bool relu;

  explicit Leaky(const ConvStage& stage) : slope(all(stage.slope)), relu(stage.slope == 0.0f) {}
  // v a'(z) by the sign of z; v = z: a(z).
  MG_METHOD F16 times_slope(F16 v, uint16_t sign) const { return select(sign, v, relu ? all(0.0f) : v * slope); }
};

// a(z), and for a piecewise linear a the sign that its slope will need.
MG_INLINE F16 activate(const ConvStage& stage, F16 z, uint16_t* sign) {
  switch (stage.activation) {
    case Activation::kNone:
      return z;
    case Activation::kLeaky:
      *sign = positive(z);
      return select(*sign, z, stage.slope == 0.0f ? all(0.0f) : z * all(stage.slope));
    default:
      return curve(stage.activation, z).value;
  }
}

// g a'(z): by the sign that was kept, or from z.
MG_INLINE F16 times_slope(const ConvStage& stage, F16 g, uint16_t sign, F16 z) {
  switch (stage.activation) {
    case Activation::kNone:
      return g;
    case Activation::kLeaky:
      return select(sign, g, stage.slope == 0.0f ? all(0.0f) : g * all(stage.slope));
    default:
      return g * curve(stage.activation, z).slope;
  }
}

}  // namespace mgebm::MGEBM_ISA
