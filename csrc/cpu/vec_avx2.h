// AVX2 vectors, with FMA and F16C.
#pragma once
#include <immintrin.h>

#include "api.h"

namespace flow_kernels {
namespace FLOW_ISA {

struct Vec {
  static constexpr int W = 8;
  static constexpr int MR = 4;  // 4 x 3 accumulators, 3 columns of B and one broadcast: all 16 registers
  using F = __m256;
  using I = __m256i;
  static inline F zero() { return _mm256_setzero_ps(); }
  static inline F set1(float x) { return _mm256_set1_ps(x); }
  static inline F load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static inline I load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static inline void store_words(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static inline I zero_words() { return _mm256_setzero_si256(); }
  static inline I broadcast(const uint32_t* p) {
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(p)));
  }
  static inline F as_float(I x) { return _mm256_castsi256_ps(x); }
  static inline I as_words(F x) { return _mm256_castps_si256(x); }
  static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  // max and min return the second operand if one is NaN: a NaN passes where it stands second.
  static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
  static inline F min(F a, F b) { return _mm256_min_ps(a, b); }
  // Lanes of `flags` become non-zero where |x| is not below `bound`, so for NaN as well.
  static inline I mark_not_below(I flags, F x, F bound) {
    const F size = _mm256_andnot_ps(set1(-0.0f), x);
    return _mm256_or_si256(flags, as_words(_mm256_cmp_ps(size, bound, _CMP_NLT_UQ)));
  }
  static inline float hmax(F x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static inline float hsum(F x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static inline F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static inline F scale(F y, F n) {
    const I exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return mul(y, as_float(exponent));
  }
  // The exponent field above holds normal numbers only; what is below them becomes 0.
  static constexpr float exp_lowest = -87.3f;
  static inline F flush(F y, F x) { return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(exp_lowest), _CMP_LT_OQ), y); }
  static inline I widen(const uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline F load_bf16(const uint16_t* p) { return as_float(_mm256_slli_epi32(widen(p), 16)); }
  static inline F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  // Values 0 ... 255 as bytes, rounded to nearest even.
  static inline F load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static inline void store_u8(uint8_t* p, F x) {
    const __m256i words = _mm256_cvtps_epi32(x);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
  }
  // bf16 bits of x, rounded to nearest even, in the low half of each word.
  static inline I bf16_bits(F x) {
    const I bits = as_words(x);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const I nan = as_words(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  }
  static inline void store_bf16(uint16_t* p, F x) {
    const I bits = bf16_bits(x);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static inline I pair(I lo, I hi) { return _mm256_or_si256(lo, _mm256_slli_epi32(hi, 16)); }

  static inline void transpose(I r[8]) {
    I t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace FLOW_ISA
}  // namespace flow_kernels
