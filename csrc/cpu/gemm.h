// Packing of operands into words, and the register-blocked product.
//
//     left operand A [M, K]: a view (AView) of words, broadcast one at a time
//     right operand B [K, N]: panels of `panel` columns (the last may be narrower), each [K words][columns]
//     C [M, N] fp32
#pragma once
#include "api.h"

namespace flow_kernels {
namespace FLOW_ISA {

// word (m, k) is at base[(m / block) * block_stride + (m % block) * row_stride + k * k_stride].
struct AView {
  const uint32_t* base;
  int64_t block, block_stride, row_stride, k_stride;
  const uint32_t* at(int64_t m) const { return base + (m / block) * block_stride + (m % block) * row_stride; }
};

// Two bf16 per word, multiplied by vdpbf16ps (exact products, fp32 sums).
#ifdef FLOW_HAS_BF16
struct Pairs {
  static constexpr int group = 2;
  static constexpr int NV = 3;
  static constexpr bool uses_brgemm = false;
  static inline F dot(F c, I a, I b) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // 2 W values, rounded.
  static inline I words(const float* p) { return Vec::bf16_words(Vec::load(p), Vec::load(p + W)); }
};

// The same words, multiplied by oneDNN's brgemm; 64 columns are two pairs of AMX tiles.
struct MatrixUnit {
  static constexpr int group = 2;
  static constexpr int NV = 4;
  static constexpr bool uses_brgemm = true;
  static inline F dot(F c, I, I) { return c; }
  static inline I words(const float* p) { return Pairs::words(p); }
};
#endif

// One fp32 per word.
struct Singles {
  static constexpr int group = 1;
  static constexpr int NV = 3;
  static constexpr bool uses_brgemm = false;
  static inline F dot(F c, I a, I b) { return Vec::fma(Vec::as_float(a), Vec::as_float(b), c); }
};

// What a word holds `group` of.
template <int group>
struct WordElement {
  using type = uint32_t;
};
template <>
struct WordElement<2> {
  typedef uint16_t __attribute__((may_alias)) type;  // stored one by one, read as words
};

// The function behind MatrixUnit, set once before its kernels are handed out.
static BrgemmFn brgemm_product = nullptr;

// The vector of fp32 values of W elements.
template <DType T>
static inline F load_floats(const void* p) {
  if constexpr (T == DType::f32) return Vec::load(static_cast<const float*>(p));
  if constexpr (T == DType::bf16) return Vec::load_bf16(static_cast<const uint16_t*>(p));
  if constexpr (T == DType::f16) return Vec::load_f16(static_cast<const uint16_t*>(p));
}

template <DType T>
static inline void store_floats(void* p, F x) {
  if constexpr (T == DType::f32) Vec::store(static_cast<float*>(p), x);
  if constexpr (T == DType::bf16) Vec::store_bf16(static_cast<uint16_t*>(p), x);
  if constexpr (T == DType::f16) Vec::store_f16(static_cast<uint16_t*>(p), x);
}

template <DType T>
constexpr int element_bytes = static_cast<int>(bytes_of(T));

// The first `count` of `lanes` elements at p, the rest 0, in `buffer` unless all are there.
template <DType T>
static inline const void* padded_elements(const void* p, int64_t count, int64_t lanes, void* buffer) {
  if (count >= lanes) return p;
  __builtin_memset(buffer, 0, lanes * element_bytes<T>);
  if (count > 0) __builtin_memcpy(buffer, p, count * element_bytes<T>);
  return buffer;
}

template <DType T>
static inline void store_some(void* p, F x, int64_t count) {
  if (count >= W) return store_floats<T>(p, x);
  alignas(64) char buffer[64];
  store_floats<T>(buffer, x);
  if (count > 0) __builtin_memcpy(p, buffer, count * element_bytes<T>);
}

// W words that hold elements [0, count) of a row, zero beyond.
template <class C, DType T>
static inline I row_words(const void* p, int64_t count) {
  alignas(64) char buffer[128];
  const void* q = padded_elements<T>(p, count, W * C::group, buffer);
  if constexpr (C::group == 2 && T == DType::f32) {
    return C::words(static_cast<const float*>(q));
  } else if constexpr (C::group == 2) {
    return Vec::load_words(q);
  } else {
    return Vec::as_words(load_floats<T>(q));
  }
}

// Word row k of [K, columns]: elements of `group` consecutive rows side by side; a null row counts as 0.
template <class C, DType T>
static inline I column_words(const void* row0, const void* row1, int64_t count) {
  alignas(64) char buffer[64];
  if constexpr (C::group == 2) {
    const auto bits = [&](const void* row) {
      if (row == nullptr) return Vec::zero_words();
      const void* elements = padded_elements<T>(row, count, W, buffer);
      if constexpr (T == DType::f32) return Vec::bf16_bits(Vec::load(static_cast<const float*>(elements)));
      return Vec::widen(static_cast<const uint16_t*>(elements));
    };
    const I lo = bits(row0), hi = bits(row1);
    return Vec::pair(lo, hi);
  }
  return row0 == nullptr ? Vec::zero_words() : Vec::as_words(load_floats<T>(padded_elements<T>(row0, count, W, buffer)));
}

// Rows of a matrix in memory, gathered by index where there is one.
struct Rows {
  const char* base;
  int64_t stride_bytes;
  const int64_t* index;
  const char* row(int64_t i) const { return base + (index == nullptr ? i : index[i]) * stride_bytes; }
};

// Columns of a panel; the last one of an operand may have fewer.
template <class C>
constexpr int64_t panel_columns = C::NV* W;

// B[k, v] = source[v, k]: right operand of the logits, from rows of the vocabulary; v < count, n padded columns.
template <class C, DType T>
static void pack_transposed(Rows source, int64_t count, int64_t n, int64_t dim, uint32_t* out) {
  const int64_t words = (dim + C::group - 1) / C::group, panel = panel_columns<C>;
  for (int64_t v0 = 0; v0 < n; v0 += W) {
    const int64_t first = v0 / panel * panel;
    const int64_t columns = n - first < panel ? n - first : panel;
    uint32_t* to = out + first * words + (v0 - first);
    for (int64_t k0 = 0; k0 < words; k0 += W) {
      I block[W];
      // The next 16 rows: the hardware follows one row, not a column of them.
      if (v0 + 2 * W <= count) {
        for (int64_t i = 0; i < W; ++i) {
          __builtin_prefetch(source.row(v0 + W + i) + k0 * C::group * element_bytes<T>);
        }
      }
      for (int64_t i = 0; i < W; ++i) {
        block[i] = v0 + i < count ? row_words<C, T>(source.row(v0 + i) + k0 * C::group * element_bytes<T>,
                                                    dim - k0 * C::group)
                                  : Vec::zero_words();
      }
      Vec::transpose(block);
      const int64_t rest = words - k0 < W ? words - k0 : W;
      for (int64_t j = 0; j < rest; ++j) Vec::store_words(to + (k0 + j) * columns, block[j]);
    }
  }
}

// B[k, n] = source[k, n] for k < count; right operand of both gradients.
template <class C, DType T>
static void pack_straight(Rows source, int64_t count, int64_t k_words, int64_t dim, uint32_t* out) {
  const int64_t n = round_up(dim, W), panel = panel_columns<C>;
  for (int64_t first = 0; first < n; first += panel) {
    const int64_t columns = n - first < panel ? n - first : panel;
    uint32_t* to = out + first * k_words;
    for (int64_t k = 0; k < k_words; ++k) {
      const int64_t r = k * C::group;
      const char* row0 = r < count ? source.row(r) : nullptr;
      const char* row1 = C::group == 2 && r + 1 < count ? source.row(r + 1) : nullptr;
      for (int64_t j = 0; j < columns; j += W) {
        const int64_t at = (first + j) * element_bytes<T>;
        Vec::store_words(to + k * columns + j,
                         column_words<C, T>(row0 == nullptr ? nullptr : row0 + at,
                                            row1 == nullptr ? nullptr : row1 + at, dim - first - j));
      }
    }
  }
}

// The left operand of the logits, its rows padded with zeros to a multiple of MR: blocks of MR rows side by side, so
// that the product reads memory in order (row-major for brgemm).
template <class C, DType T>
static void pack_left(Rows source, int64_t count, int64_t dim, uint32_t* out) {
  constexpr int64_t MR = Vec::MR;
  const int64_t words = (dim + C::group - 1) / C::group;
  for (int64_t m = 0; m < round_up(count, MR); ++m) {
    for (int64_t k0 = 0; k0 < words; k0 += W) {
      alignas(64) uint32_t block[W];
      Vec::store_words(block, m < count ? row_words<C, T>(source.row(m) + k0 * C::group * element_bytes<T>,
                                                          dim - k0 * C::group)
                                        : Vec::zero_words());
      const int64_t rest = words - k0 < W ? words - k0 : W;
      for (int64_t j = 0; j < rest; ++j) {
        const int64_t at = C::uses_brgemm ? m * words + k0 + j : m / MR * MR * words + (k0 + j) * MR + m % MR;
        out[at] = block[j];
      }
    }
  }
}

template <class C>
static inline AView left_view(const uint32_t* packed, int64_t words) {
  if (C::uses_brgemm) return {packed, INT64_MAX, 0, words, 1};
  return {packed, Vec::MR, Vec::MR * words, 1, Vec::MR};
}

template <class C, int NV>
static inline void micro_product(int64_t k_words, const uint32_t* a, int64_t row_stride, int64_t k_stride,
                                 const uint32_t* b, float* c, int64_t ldc, bool add) {
  constexpr int MR = Vec::MR;
  F acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      acc[r][j] = Vec::zero();
      // C comes from L3: on its way while the product runs, not waited for in front of it.
      if (add) __builtin_prefetch(c + r * ldc + j * W, 1);
    }
  }
  for (int64_t k = 0; k < k_words; ++k) {
    I columns[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) columns[j] = Vec::load_words(b + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const I ar = Vec::broadcast(a + r * row_stride);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] = C::dot(acc[r][j], ar, columns[j]);
    }
    a += k_stride;
    b += NV * W;
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* to = c + r * ldc + j * W;
      Vec::store(to, add ? Vec::add(acc[r][j], Vec::load(to)) : acc[r][j]);
    }
  }
}

// C[m_rows, columns of one panel] (+)= A B, m_rows a multiple of MR.
template <class C>
static inline void panel_product(int64_t m0, int64_t m_rows, int64_t columns, int64_t k_words, const AView& a,
                                 const uint32_t* b, float* c, int64_t ldc, bool add) {
  if constexpr (C::uses_brgemm) {
    if (k_words == 0) {  // an empty sum, for which oneDNN has no kernel
      for (int64_t m = 0; m < (add ? 0 : m_rows); ++m) __builtin_memset(c + m * ldc, 0, columns * sizeof(float));
      return;
    }
    brgemm_product(m_rows, columns, 2 * k_words, 2 * a.row_stride, columns, ldc, add, a.at(m0), b, c);
  } else {
    for (int64_t m = 0; m < m_rows; m += Vec::MR) {
      const uint32_t* am = a.at(m0 + m);
      float* cm = c + m * ldc;
      switch (columns / W) {
        case 1: micro_product<C, 1>(k_words, am, a.row_stride, a.k_stride, b, cm, ldc, add); break;
        case 2: micro_product<C, 2>(k_words, am, a.row_stride, a.k_stride, b, cm, ldc, add); break;
        default: micro_product<C, 3>(k_words, am, a.row_stride, a.k_stride, b, cm, ldc, add); break;
      }
    }
  }
}

// C[count rounded up to MR, n] = A B with words of A read where they lie, row by row; what is beyond count is anything.
template <class C, int NV>
static inline void narrow_micro_product(int64_t k_words, Rows source, int64_t row, int64_t count, const uint32_t* b,
                                        float* c, int64_t ldc) {
  constexpr int MR = Vec::MR;
  const uint32_t* a[MR];
  for (int r = 0; r < MR; ++r) {
    a[r] = reinterpret_cast<const uint32_t*>(source.row(row + r < count ? row + r : count - 1));
  }
  F acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec::zero();
  }
  for (int64_t k0 = 0; k0 < k_words; k0 += 16) {
    const int64_t end = k0 + 16 < k_words ? k0 + 16 : k_words;
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      __builtin_prefetch(reinterpret_cast<const char*>(a[r] + k0) + MR * source.stride_bytes);
    }
    for (int64_t k = k0; k < end; ++k) {
      I columns[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) columns[j] = Vec::load_words(b + j * W);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const I ar = Vec::broadcast(a[r] + k);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[r][j] = C::dot(acc[r][j], ar, columns[j]);
      }
      b += NV * W;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) Vec::store(c + r * ldc + j * W, acc[r][j]);
  }
}

// C[count, n] = A B with A's rows as they lie, of an even number of 16-bit elements or fp32, and n a multiple of W; rows of
// C up to the next multiple of MR are written.
template <class C>
static void narrow_product(Rows source, int64_t count, int64_t n, int64_t k_words, const uint32_t* b, float* c) {
  const int64_t panel = panel_columns<C>;
  for (int64_t row = 0; row < count; row += Vec::MR) {
    for (int64_t first = 0; first < n; first += panel) {
      const uint32_t* columns = b + first * k_words;
      float* to = c + row * n + first;
      switch ((n - first < panel ? n - first : panel) / W) {
        case 1: narrow_micro_product<C, 1>(k_words, source, row, count, columns, to, n); break;
        case 2: narrow_micro_product<C, 2>(k_words, source, row, count, columns, to, n); break;
        default: narrow_micro_product<C, 3>(k_words, source, row, count, columns, to, n); break;
      }
    }
  }
}

// C[m_rows, n] (+)= A[m0:m0 + m_rows] B, m_rows a multiple of MR and n of W.
template <class C>
static void product(int64_t m0, int64_t m_rows, int64_t n, int64_t k_words, const AView& a, const uint32_t* b,
                    float* c, int64_t ldc, bool add) {
  const int64_t panel = panel_columns<C>;
  for (int64_t first = 0; first < n; first += panel) {
    const int64_t columns = n - first < panel ? n - first : panel;
    panel_product<C>(m0, m_rows, columns, k_words, a, b + first * k_words, c + first, ldc, add);
  }
}

// out[0:count, 0:dim] = A B, rounded once to T, row m at index[m] where there is an index; rows of A are padded to a
// multiple of MR.
template <class C, DType T>
static void product_rounded(int64_t count, int64_t dim, int64_t k_words, const AView& a, const uint32_t* b, char* out,
                            int64_t out_stride_bytes, const int64_t* index = nullptr) {
  constexpr int64_t MB = C::uses_brgemm ? 64 : Vec::MR;
  alignas(64) float c[MB * panel_columns<C>];
  const int64_t n = round_up(dim, W), panel = panel_columns<C>;
  for (int64_t first = 0; first < n; first += panel) {
    const int64_t columns = n - first < panel ? n - first : panel;
    for (int64_t m = 0; m < count; m += MB) {
      const int64_t rows = count - m < MB ? count - m : MB;
      panel_product<C>(m, round_up(rows, Vec::MR), columns, k_words, a, b + first * k_words, c, columns, false);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = index == nullptr ? m + r : index[m + r];
        char* to = out + row * out_stride_bytes + first * element_bytes<T>;
        for (int64_t j = 0; j < columns; j += W) {
          store_some<T>(to + j * element_bytes<T>, Vec::load(c + r * columns + j), dim - first - j);
        }
      }
    }
  }
}

}  // namespace FLOW_ISA
}  // namespace flow_kernels
