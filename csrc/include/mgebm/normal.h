// From words to uniforms and normals, with polynomials of our own: host and device agree bit for bit, and both
// stay within 1e-6 of float64 computed from the same u. scripts/fit_polynomials.py makes the coefficients.
#pragma once

#include "philox.h"

namespace mgebm {

// u in (0, 1]: word 0 gives 2^-33, the largest words round to 1, so the logarithm below is always finite.
MG_HD float uniform_of(uint32_t word) { return fused(static_cast<float>(word), 0x1p-32f, 0x1p-33f); }

// ln u for u in [2^-33, 1], to about one unit in the last place also next to u = 1, where ln u vanishes.
MG_HD float log_of(float u) {
  // u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): no cancellation between e ln 2 and ln(1 + f).
  constexpr uint32_t kSqrtHalf = 0x3F3504F3u;
  const uint32_t shifted = as_bits(u) - kSqrtHalf;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = as_float((shifted & 0x007FFFFFu) + kSqrtHalf) - 1.0f;
  float p = -0.0786544457f;
  p = fused(p, f, 0.128791988f);
  p = fused(p, f, -0.131252959f);
  p = fused(p, f, 0.141814202f);
  p = fused(p, f, -0.166249692f);
  p = fused(p, f, 0.200022832f);
  p = fused(p, f, -0.250007957f);
  p = fused(p, f, 0.333333164f);
  const float log1p = fused(f * f, fused(f, p, -0.5f), f);
  constexpr float kLn2High = 0.693147182f, kLn2Low = -1.90465421e-9f;
  return fused(e, kLn2High, fused(e, kLn2Low, log1p));
}

struct SinCos {
  float sine, cosine;
};

// sin and cos of 2 pi u for u in [0, 1]. The reduction 4u = k + r is exact, and |r| <= 1/2 is a quarter turn's half.
MG_HD SinCos sincos_turns(float u) {
  const float quarters = 4.0f * u;
  const int32_t k = static_cast<int32_t>(quarters + 0.5f);
  const float r = quarters - static_cast<float>(k);
  const float s = r * r;
  float sine = -0.00460214540f;
  sine = fused(sine, s, 0.0796802193f);
  sine = fused(sine, s, -0.645963490f);
  sine = fused(sine, s, -4.37113883e-8f);  // pi/2 in two parts: one rounding less in the largest term
  sine = fused(r, 1.57079637f, sine * r);
  float cosine = 0.000904054497f;
  cosine = fused(cosine, s, -0.0208603051f);
  cosine = fused(cosine, s, 0.253669232f);
  cosine = fused(cosine, s, -1.23370051f);
  cosine = fused(cosine, s, 1.0f);
  // Quadrant k turns (sine, cosine) by k quarter turns: an odd k swaps them, two bits of k give the signs.
  const bool odd = k & 1;
  const uint32_t q = static_cast<uint32_t>(k);
  const uint32_t sine_bits = as_bits(odd ? cosine : sine) ^ ((q & 2u) << 30);
  const uint32_t cosine_bits = as_bits(odd ? sine : cosine) ^ (((q + 1u) & 2u) << 30);
  return {as_float(sine_bits), as_float(cosine_bits)};
}

struct Quad {
  float v0, v1, v2, v3;
};

MG_HD Quad uniforms_of(Words w) { return {uniform_of(w.w0), uniform_of(w.w1), uniform_of(w.w2), uniform_of(w.w3)}; }

struct NormalPair {
  float v0, v1;
};

// Box-Muller.
MG_HD NormalPair normals_of(uint32_t w0, uint32_t w1) {
  const float radius = square_root(-2.0f * log_of(uniform_of(w0)));
  const SinCos turn = sincos_turns(uniform_of(w1));
  return {radius * turn.cosine, radius * turn.sine};
}
MG_HD Quad normals_of(Words w) {
  const NormalPair a = normals_of(w.w0, w.w1), b = normals_of(w.w2, w.w3);
  return {a.v0, a.v1, b.v0, b.v1};
}

enum class Distribution : int { kNormal = 0, kUniform = 1, kBits = 2 };

MG_HD Quad noise_quad(Words words, Distribution distribution) {
  return distribution == Distribution::kNormal ? normals_of(words) : uniforms_of(words);
}

}  // namespace mgebm
