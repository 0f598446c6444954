// AVX-512 vectors (F, BW, DQ, VL).
#pragma once
#include <immintrin.h>

#include "api.h"

namespace flow_kernels {
namespace FLOW_ISA {

struct Vec {
  static constexpr int W = 16;
  static constexpr int MR = 8;  // 8 x 3 accumulators, 3 columns of B and one broadcast: 28 of 32 registers
  using F = __m512;
  using I = __m512i;
  static inline F zero() { return _mm512_setzero_ps(); }
  static inline F set1(float x) { return _mm512_set1_ps(x); }
  static inline F load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static inline I load_words(const void* p) { return _mm512_loadu_si512(p); }
  static inline void store_words(void* p, I x) { _mm512_storeu_si512(p, x); }
  static inline I zero_words() { return _mm512_setzero_si512(); }
  // p may be of any alignment: words of 16-bit rows are read where they lie.
  static inline I broadcast(const uint32_t* p) {
    int word;
    __builtin_memcpy(&word, p, sizeof(word));
    return _mm512_set1_epi32(word);
  }
  static inline F as_float(I x) { return _mm512_castsi512_ps(x); }
  static inline I as_words(F x) { return _mm512_castps_si512(x); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  // max and min return the second operand if one is NaN: a NaN passes where it stands second.
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
  // Lanes of `flags` become non-zero where |x| is not below `bound`, so for NaN as well.
  static inline I mark_not_below(I flags, F x, F bound) {
    return _mm512_mask_set1_epi32(flags, _mm512_cmp_ps_mask(_mm512_abs_ps(x), bound, _CMP_NLT_UQ), -1);
  }
  static inline float hmax(F x) { return _mm512_reduce_max_ps(x); }
  static inline float hsum(F x) { return _mm512_reduce_add_ps(x); }
  static inline F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // y * 2^n; gradual underflow, so that exp(-104) and below are 0.
  static inline F scale(F y, F n) { return _mm512_scalef_ps(y, n); }
  static constexpr float exp_lowest = -104.0f;
  static inline F flush(F y, F) { return y; }
  static inline I widen(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline F load_bf16(const uint16_t* p) { return as_float(_mm512_slli_epi32(widen(p), 16)); }
  static inline F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline void store_f16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  // Values 0 ... 255 as bytes, rounded to nearest even.
  static inline F load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static inline void store_u8(uint8_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
  }
  // bf16 bits of x, rounded to nearest even, in the low half of each word.
  static inline I bf16_bits(F x) {
#ifdef FLOW_HAS_BF16
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
    const I bits = as_words(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_mask_set1_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), 0x7fc0);
#endif
  }
  static inline void store_bf16(uint16_t* p, F x) {
#ifdef FLOW_HAS_BF16
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(x)));
#endif
  }
#ifdef FLOW_HAS_BF16
  // 32 values in order, rounded to bf16, as pairs of neighbours.
  static inline I bf16_words(F first, F second) { return reinterpret_cast<I>(_mm512_cvtne2ps_pbh(second, first)); }
#endif
  // Two vectors of 16-bit values (low halves) as pairs: `lo` in the low half of each word.
  static inline I pair(I lo, I hi) { return _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)); }

  static inline void transpose(I r[16]) {
    I t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
      r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }
};

}  // namespace FLOW_ISA
}  // namespace flow_kernels
