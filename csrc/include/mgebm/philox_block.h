// Philox for a run of consecutive quads of one sample. For *_cpu.cpp files only.
//
// Each 64-bit lane holds one 32-bit state word, with anything above it: a widening multiply reads the low half alone,
// so low and high words of a product need no shuffle. Compilers do not find this from the scalar code (2-4x slower).
#pragma once

#include "counters.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mgebm::MGEBM_ISA {

constexpr int kBlockQuads = 256;

struct WordBlock {
  alignas(64) uint32_t w[4][kBlockQuads];
};

#if defined(__AVX512F__)
struct Lanes {
  static constexpr int kCount = 8;
  using Register = __m512i;
  static __attribute__((always_inline)) inline Register all(uint64_t v) { return _mm512_set1_epi64(v); }
  static __attribute__((always_inline)) inline Register load(const uint64_t* at) { return _mm512_loadu_si512(at); }
  static __attribute__((always_inline)) inline Register from(uint64_t v) {
    return _mm512_add_epi64(all(v), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  }
  static __attribute__((always_inline)) inline Register multiply(Register a, Register b) {
    return _mm512_mul_epu32(a, b);
  }
  static __attribute__((always_inline)) inline Register high_xor(Register p, Register a, Register b) {
    constexpr int kXorOfThree = 0x96;
    return _mm512_ternarylogic_epi64(_mm512_srli_epi64(p, 32), a, b, kXorOfThree);
  }
  static __attribute__((always_inline)) inline void store_low(uint32_t* out, Register a) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(a));
  }
};
#elif defined(__AVX2__)
struct Lanes {
  static constexpr int kCount = 4;
  using Register = __m256i;
  static __attribute__((always_inline)) inline Register all(uint64_t v) { return _mm256_set1_epi64x(v); }
  static __attribute__((always_inline)) inline Register load(const uint64_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  }
  static __attribute__((always_inline)) inline Register from(uint64_t v) {
    return _mm256_add_epi64(all(v), _mm256_set_epi64x(3, 2, 1, 0));
  }
  static __attribute__((always_inline)) inline Register multiply(Register a, Register b) {
    return _mm256_mul_epu32(a, b);
  }
  static __attribute__((always_inline)) inline Register high_xor(Register p, Register a, Register b) {
    return _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p, 32), a), b);
  }
  static __attribute__((always_inline)) inline void store_low(uint32_t* out, Register a) {
    const __m256i packed = _mm256_permutevar8x32_epi32(a, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
    _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
  }
};
#endif

#if defined(__AVX2__)
// The ten rounds of two sets of counters: two independent ones hide the multiplier's latency.
static inline __attribute__((always_inline)) void philox_rounds(Lanes::Register& a0, Lanes::Register& a1,
                                                                Lanes::Register& a2, Lanes::Register& a3,
                                                                Lanes::Register& b0, Lanes::Register& b1,
                                                                Lanes::Register& b2, Lanes::Register& b3, uint32_t k0,
                                                                uint32_t k1) {
  using L = Lanes;
  const auto m0 = L::all(kPhiloxMultiplier0), m1 = L::all(kPhiloxMultiplier1);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const auto v0 = L::all(k0), v1 = L::all(k1);
    const auto p0 = L::multiply(a0, m0), p1 = L::multiply(a2, m1);
    const auto q0 = L::multiply(b0, m0), q1 = L::multiply(b2, m1);
    a0 = L::high_xor(p1, a1, v0), a2 = L::high_xor(p0, a3, v1), a1 = p1, a3 = p0;
    b0 = L::high_xor(q1, b1, v0), b2 = L::high_xor(q0, b3, v1), b1 = q1, b3 = q0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
}
#endif

// block.w[j][i] <- word j of quad first_quad + i, for i < quads; what lies above, up to whole registers, is
// overwritten.
static inline __attribute__((always_inline)) void philox_block(const SampleKey& key, uint32_t first_quad, int quads,
                                                               WordBlock& block) {
#if defined(__AVX2__)
  using L = Lanes;
  for (int i = 0; i < quads; i += 2 * L::kCount) {
    auto a0 = L::from(uint64_t{first_quad} + i), b0 = L::from(uint64_t{first_quad} + i + L::kCount);
    auto a1 = L::all(key.sample), a2 = L::all(key.step), a3 = L::all(key.stream);
    auto b1 = a1, b2 = a2, b3 = a3;
    philox_rounds(a0, a1, a2, a3, b0, b1, b2, b3, key.k0, key.k1);
    L::store_low(&block.w[0][i], a0), L::store_low(&block.w[0][i + L::kCount], b0);
    L::store_low(&block.w[1][i], a1), L::store_low(&block.w[1][i + L::kCount], b1);
    L::store_low(&block.w[2][i], a2), L::store_low(&block.w[2][i + L::kCount], b2);
    L::store_low(&block.w[3][i], a3), L::store_low(&block.w[3][i + L::kCount], b3);
  }
#else
  for (int i = 0; i < quads; ++i) {
    const Words words = words_at(key, first_quad + static_cast<uint32_t>(i));
    block.w[0][i] = words.w0;
    block.w[1][i] = words.w1;
    block.w[2][i] = words.w2;
    block.w[3][i] = words.w3;
  }
#endif
}

// words[j][i] <- word j of one quad of 16 samples: samples[i], the low halves, are their ids.
static inline __attribute__((always_inline)) void philox_samples(const SampleKey& key, uint32_t quad,
                                                                 const uint64_t* samples, uint32_t (*words)[16]) {
#if defined(__AVX2__)
  using L = Lanes;
  for (int i = 0; i < 16; i += 2 * L::kCount) {
    auto a0 = L::all(quad), a1 = L::load(samples + i), a2 = L::all(key.step), a3 = L::all(key.stream);
    auto b0 = a0, b1 = L::load(samples + i + L::kCount), b2 = a2, b3 = a3;
    philox_rounds(a0, a1, a2, a3, b0, b1, b2, b3, key.k0, key.k1);
    L::store_low(&words[0][i], a0), L::store_low(&words[0][i + L::kCount], b0);
    L::store_low(&words[1][i], a1), L::store_low(&words[1][i + L::kCount], b1);
    L::store_low(&words[2][i], a2), L::store_low(&words[2][i + L::kCount], b2);
    L::store_low(&words[3][i], a3), L::store_low(&words[3][i + L::kCount], b3);
  }
#else
  for (int i = 0; i < 16; ++i) {
    const uint32_t sample = static_cast<uint32_t>(samples[i]);
    const Words w = philox(quad, sample, key.step, key.stream, key.k0, key.k1);
    words[0][i] = w.w0, words[1][i] = w.w1, words[2][i] = w.w2, words[3][i] = w.w3;
  }
#endif
}

}  // namespace mgebm::MGEBM_ISA
