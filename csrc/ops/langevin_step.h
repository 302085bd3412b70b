// langevin_step: x <- clamp(x - drift (clip(grad, +-c) + (x - m) / sigma^2) + noise_std eps), in place.
#pragma once

#include "mgebm/counters.h"

namespace mgebm {

enum class GradType : int { kFloat = 0, kHalf = 1, kBfloat = 2 };

// Apart from the rest, so that a loop keeps them in registers.
struct LangevinStepCoefficients {
  float drift, noise_std, inverse_variance, reference_mean;
  float grad_clamp;  // infinity where not asked for
  float low, high;   // -infinity, infinity where not asked for
  MGEBM_FIELDS(drift, noise_std, inverse_variance, reference_mean, grad_clamp, low, high)
};

// The numbers of a chain: the same for all, or in memory, where they may differ by step, sample and element and where a
// replayed graph sees them change.
struct LangevinStepNumbers {
  LangevinStepCoefficients all;
  const float* at;             // [step][sample][3]: drift, noise_std, 1 / sigma^2; null: those of `all`
  int64_t by_step, by_sample;  // from one step or sample to the next, in floats; 0 where they are the same
  const float* mean;           // m of each element, in (channel, spatial) order; null: that of `all`
  int64_t mean_by_sample;      // from one sample to the next; 0 where they are the same
  MGEBM_FIELDS(all, at, by_step, by_sample, mean, mean_by_sample)
};

// Of the chain's k-th step.
MG_HD LangevinStepCoefficients coefficients_of(const LangevinStepNumbers& numbers, int64_t k, int64_t sample) {
  LangevinStepCoefficients found = numbers.all;
  if (numbers.at) {
    const float* const at = numbers.at + k * numbers.by_step + sample * numbers.by_sample;
    found.drift = at[0], found.noise_std = at[1], found.inverse_variance = at[2];
  }
  return found;
}

MG_HD const float* means_of(const LangevinStepNumbers& numbers, int64_t sample) {
  return numbers.mean ? numbers.mean + sample * numbers.mean_by_sample : nullptr;
}

struct LangevinStepParams {
  float* x;
  const void* grad;
  const uint8_t* mask;  // null: every pixel is updated; else 0 holds a pixel. Strides are 0 where broadcast
  int64_t samples, channels, spatial;
  Strides x_strides, grad_strides, mask_strides;
  LangevinStepNumbers update;
  GradType grad_type;
  Counters counters;
  MGEBM_FIELDS(x, grad, mask, samples, channels, spatial, x_strides, grad_strides, mask_strides, grad_type, update,
               counters)
};

MG_HD float half_to_float(uint16_t half) {
  // The exponent moves by 2^112, an exact product that also normalises subnormals; infinities and NaN are put right.
  const uint32_t magnitude = (half & 0x7FFFu) << 13;
  const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
  return as_float(scaled | special | (half & 0x8000u) << 16);
}

MG_HD float bfloat_to_float(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

MG_HD float load_gradient(const float* at) { return *at; }

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};
MG_HD float load_gradient(const Half* at) { return half_to_float(at->bits); }
MG_HD float load_gradient(const Bfloat* at) { return bfloat_to_float(at->bits); }

// One element. The comparisons let NaN through: a diverged chain must stay visible.
MG_HD float langevin_step_update(const LangevinStepCoefficients& k, float x, float gradient, float normal) {
  gradient = gradient < -k.grad_clamp ? -k.grad_clamp : gradient;
  gradient = gradient > k.grad_clamp ? k.grad_clamp : gradient;
  const float force = fused(x - k.reference_mean, k.inverse_variance, gradient);
  float value = fused(-k.drift, force, x);
  value = fused(k.noise_std, normal, value);
  value = value < k.low ? k.low : value;
  return value > k.high ? k.high : value;
}

}  // namespace mgebm
