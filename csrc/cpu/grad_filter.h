// Leaving out classes whose gradients are small in every row of a block (grad_filter_eps): found while the gradients are
// made, gathered in front of the products. A trained model's rows have most of a large vocabulary far below any
// rounding, and in different classes only a little, so what is left of a tile is small.
#pragma once
#include "api.h"

namespace flow_kernels {
namespace FLOW_ISA {

// Flag the classes whose gradient d is not below `bound`. NaN is not, so it stays.
static inline void mark_active(const float* d, int64_t padded, float bound, uint32_t* flags) {
  const F vbound = Vec::set1(bound);
  for (int64_t j = 0; j < padded; j += W) {
    Vec::store_words(flags + j, Vec::mark_not_below(Vec::load_words(flags + j), Vec::load(d + j), vbound));
  }
}

// The flagged ones of n classes, in order; returns their number.
static inline int64_t list_active(const uint32_t* flags, int64_t n, int64_t* index) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    index[count] = j;
    count += flags[j] != 0;
  }
  return count;
}

// Classes of a product of `count` active ones. oneDNN makes a kernel for every shape, so its shapes are few.
template <class C>
static inline int64_t padded_active(int64_t count, int64_t tile_padded) {
  const int64_t kept = round_up(count, C::uses_brgemm ? panel_columns<C> : W);
  return kept < tile_padded ? kept : tile_padded;
}

// Columns index[0:count] of p [rows, padded], padded with zeros to `kept`: in place as the left operand of dinput, and
// in `pairs` (if any) as tiles.h keeps the probabilities for dweight.
template <class C>
static void gather_active(const int64_t* index, int64_t count, int64_t kept, int64_t rows, int64_t padded,
                          uint32_t* p, uint32_t* pairs) {
  using Element = typename WordElement<C::group>::type;
  const int64_t k_words = rows / C::group;
  Element* elements = reinterpret_cast<Element*>(p);
  for (int64_t r = 0; r < rows; r += C::group) {
    const Element *row0 = elements + r * padded, *row1 = row0 + (C::group - 1) * padded;
    for (int64_t c0 = 0; pairs != nullptr && c0 < kept; c0 += W) {
      uint32_t* to = pairs + c0 * k_words + r / C::group * W;
      for (int64_t c = 0; c < W; ++c) {
        uint32_t word = 0;
        if (c0 + c < count) {
          word = row0[index[c0 + c]];
          if constexpr (C::group == 2) word |= static_cast<uint32_t>(row1[index[c0 + c]]) << 16;
        }
        to[c] = word;
      }
    }
    // kept <= padded and index[c] >= c, so nothing is written in front of which something is still to be read.
    for (int64_t i = r; i < r + C::group; ++i) {
      for (int64_t c = 0; c < kept; ++c) elements[i * kept + c] = c < count ? elements[i * padded + index[c]] : 0;
    }
  }
}

}  // namespace FLOW_ISA
}  // namespace flow_kernels
