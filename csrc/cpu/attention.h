// Attention of one segment of a packed row to the tokens it sees, for the query heads that share one key head.
//
// A segment's keys are those of the segments before it in its text and then its own; key j stands at place j of the text,
// so a query at place p sees the keys (p - window, p]. Keys are packed once, then blocks of queries are walked: scores
// [rows, keys] are made, used and forgotten while they are in cache, forward and again backward (from the saved lse).
// A row is one query head of one token; the heads of a token stand side by side.
#pragma once
#include <math.h>

#include "api.h"
#include "scratch.h"

namespace flow_kernels {
namespace FLOW_ISA {

// Rows whose scores are made at a time.
constexpr int64_t attention_rows = 256;

// oneDNN keeps code for every shape and stride of a product it was ever asked for, 40 KB and about a millisecond each, and
// the lengths of texts have no end: so rows come in pieces of these, the summed dimension in blocks, and strides are few.
constexpr int64_t brgemm_rows[] = {64, 16, 8};
constexpr int64_t brgemm_words = 256;

// A stride for `keys` elements: the next of 64, 96, 128, 192, 256 ... and 32 more, so that rows do not fall on each other
// in a cache.
static inline int64_t key_stride(int64_t keys) {
  int64_t power = 64;
  while (2 * power <= keys) power *= 2;
  return (keys <= power ? power : keys <= power + power / 2 ? power + power / 2 : 2 * power) + 32;
}

// A segment's sizes, padded as the products want them.
template <class C>
struct AttentionShape {
  int64_t keys, stride, words, columns, tokens, rows;
  AttentionShape(const AttentionProblem& problem, int64_t num_keys, int64_t num_queries) {
    constexpr int64_t multiple = C::uses_brgemm ? panel_columns<C> : W;
    static_assert(attention_key_multiple % multiple == 0, "the sums of dkey and dvalue have room for this many keys");
    keys = round_up(num_keys, multiple);
    stride = C::uses_brgemm ? key_stride(keys) : keys;
    words = (problem.dim + C::group - 1) / C::group;
    columns = round_up(problem.dim, W);
    const int64_t fit = attention_rows / problem.heads;
    tokens = fit < num_queries ? fit : num_queries;
    rows = round_up(tokens * problem.heads, W);
  }
};

// A thread's scratch for one segment, cut into its buffers.
template <class C>
struct AttentionScratch {
  uint32_t *key_transposed, *value_straight, *query, *p;
  uint32_t *key_straight, *value_transposed, *dout, *query_straight, *dout_straight, *p_transposed, *ds_transposed;
  int64_t* index;
  float *scores, *dp, *product;
  int64_t bytes = 0;

  AttentionScratch(const AttentionShape<C>& shape, bool backward, char* base) {
    const auto [keys, stride, words, columns, tokens, rows] = shape;
    Room room{base};
    key_transposed = room.take<uint32_t>(keys * words);
    value_straight = room.take<uint32_t>(backward ? 0 : keys / C::group * columns);
    query = room.take<uint32_t>(rows * words);
    index = room.take<int64_t>(keys + rows);
    scores = room.take<float>(rows * stride);
    p = room.take<uint32_t>(rows * stride / C::group);
    product = room.take<float>(rows * columns);
    key_straight = room.take<uint32_t>(backward ? keys / C::group * columns : 0);
    value_transposed = room.take<uint32_t>(backward ? keys * words : 0);
    dout = room.take<uint32_t>(backward ? rows * words : 0);
    query_straight = room.take<uint32_t>(backward ? rows / C::group * columns : 0);
    dout_straight = room.take<uint32_t>(backward ? rows / C::group * columns : 0);
    p_transposed = room.take<uint32_t>(backward ? keys * rows / C::group : 0);
    ds_transposed = room.take<uint32_t>(backward ? keys * rows / C::group : 0);
    dp = room.take<float>(backward ? rows * stride : 0);
    bytes = room.bytes;
  }
};

template <class C>
static int64_t attention_scratch_bytes(const AttentionProblem& problem, int64_t num_keys, int64_t num_queries,
                                       bool backward) {
  return AttentionScratch<C>(AttentionShape<C>(problem, num_keys, num_queries), backward, nullptr).bytes;
}

// The elements at `offset` in memory, whatever the strides of tokens and heads are.
template <DType T>
static inline Rows elements_at(const void* base, const int64_t* offset) {
  return {static_cast<const char*>(base), element_bytes<T>, offset};
}

static inline void token_offsets(const HeadsView& view, const int64_t* tokens, int64_t count, int64_t head,
                                 int64_t* offset) {
  for (int64_t j = 0; j < count; ++j) offset[j] = tokens[j] * view.token_stride + head * view.head_stride;
}

// Tokens [first, first + count), each with all its heads of the group.
static inline void row_offsets(const HeadsView& view, int64_t first, int64_t count, int64_t group, int64_t heads,
                               int64_t* offset) {
  for (int64_t r = 0; r < count * heads; ++r) {
    offset[r] = (first + r / heads) * view.token_stride + (group * heads + r % heads) * view.head_stride;
  }
}

// C[rows rounded up to MR, columns of one panel] (+)= A B.
template <class C>
static inline void attention_product(int64_t rows, int64_t columns, int64_t k_words, const AView& a, const uint32_t* b,
                                     float* c, int64_t ldc, bool add) {
  const int64_t padded = round_up(rows, Vec::MR);
  if constexpr (!C::uses_brgemm) return panel_product<C>(0, padded, columns, k_words, a, b, c, ldc, add);
  for (int64_t k = 0; k < k_words; k += brgemm_words) {
    const int64_t some = k_words - k < brgemm_words ? k_words - k : brgemm_words;
    const AView left{a.base + k, INT64_MAX, 0, a.row_stride, 1};
    int64_t m = 0;
    for (const int64_t piece : brgemm_rows) {
      for (; m + piece <= padded; m += piece) {
        panel_product<C>(m, piece, columns, some, left, b + k * columns, c + m * ldc, ldc, add || k > 0);
      }
    }
  }
}

// C[rows, n] = A B with the summed dimension's words [first, last) of a right operand packed with all of `k_words`.
template <class C>
static inline void product_of_some(int64_t rows, int64_t n, int64_t first, int64_t last, const uint32_t* a,
                                   int64_t row_stride, const uint32_t* b, int64_t k_words, float* c, int64_t ldc,
                                   bool add) {
  const int64_t panel = panel_columns<C>;
  const AView left{a + first, INT64_MAX, 0, row_stride, 1};
  for (int64_t column = 0; column < n; column += panel) {
    const int64_t columns = n - column < panel ? n - column : panel;
    attention_product<C>(rows, columns, last - first, left, b + column * k_words + first * columns, c + column, ldc,
                         add);
  }
}

// The keys that some query of a block sees: whole panels, so that they can be told from the packed operands.
struct Seen {
  int64_t first, last;
};
template <class C>
static inline Seen seen_by(const AttentionProblem& problem, int64_t place, int64_t count, int64_t padded_keys) {
  const int64_t panel = panel_columns<C>, low = place - problem.window + 1, last = round_up(place + count, panel);
  return {problem.window > 0 && low > 0 ? low / panel * panel : 0, last < padded_keys ? last : padded_keys};
}

// scores[rows, seen keys] = A B of operands whose summed dimension is a head's.
template <class C>
static inline void scores_of(const AttentionShape<C>& shape, int64_t rows, Seen seen, const uint32_t* a,
                             const uint32_t* b, float* scores) {
  const int64_t panel = panel_columns<C>;
  for (int64_t key = seen.first; key < seen.last; key += panel) {
    const int64_t rest = shape.keys - key, columns = rest < panel ? rest : panel;
    attention_product<C>(rows, columns, shape.words, left_view<C>(a, shape.words), b + key * shape.words,
                         scores + key, shape.stride, false);
  }
}

// The keys [first, last) that the query at `place` sees; the others of its row are to be 0.
static inline Seen seen_at(const AttentionProblem& problem, int64_t place) {
  const int64_t low = place - problem.window + 1;
  return {problem.window > 0 && low > 0 ? low : 0, place + 1};
}

static inline void zero_outside(float* row, Seen inside, Seen all) {
  for (int64_t j = all.first; j < inside.first; ++j) row[j] = 0.0f;
  for (int64_t j = inside.last; j < all.last; ++j) row[j] = 0.0f;
}

// The row's values as the words of a left operand.
template <class C>
static inline void round_row(const float* row, Seen seen, uint32_t* words) {
  if constexpr (C::group == 2) {
    uint16_t* out = reinterpret_cast<uint16_t*>(words);
    for (int64_t j = seen.first; j < seen.last; j += W) Vec::store_bf16(out + j, Vec::load(row + j));
  } else {
    for (int64_t j = seen.first; j < seen.last; j += W) Vec::store_words(words + j, Vec::as_words(Vec::load(row + j)));
  }
}

// exp(scale * score - largest) in place and as words, their sum, and the largest.
template <class C>
static inline float exponentials(const AttentionProblem& problem, float* row, Seen inside, Seen all, uint32_t* words,
                                 float* sum) {
  const F scale = Vec::set1(problem.scale);
  const int64_t start = inside.first / W * W, end = round_up(inside.last, W);
  for (int64_t j = start; j < inside.first; ++j) row[j] = -INFINITY;
  for (int64_t j = inside.last; j < end; ++j) row[j] = -INFINITY;
  F m = Vec::set1(-INFINITY);
  for (int64_t j = start; j < end; j += W) {
    const F score = Vec::mul(Vec::load(row + j), scale);
    Vec::store(row + j, score);
    m = Vec::max(m, score);
  }
  const float largest = Vec::hmax(m);
  const F shift = Vec::set1(largest);
  F total = Vec::zero();
  for (int64_t j = start; j < end; j += W) {
    const F e = exp_(Vec::sub(Vec::load(row + j), shift));
    total = Vec::add(total, e);
    Vec::store(row + j, e);
  }
  zero_outside(row, {start, end}, all);
  round_row<C>(row, all, words);
  *sum = Vec::hsum(total);
  return largest;
}

template <class C, DType T>
static void attention_forward_of(const AttentionProblem& problem, const AttentionSegment& segment, int64_t group,
                                 char* base) {
  const int64_t before = segment.num_keys - segment.length;
  const AttentionShape<C> shape(problem, segment.num_keys, segment.length);
  const AttentionScratch<C> s(shape, false, base);
  const int64_t key_words = shape.keys / C::group, p_words = shape.stride / C::group, heads = problem.heads;
  token_offsets(problem.key, segment.keys, segment.num_keys, group, s.index);
  pack_transposed<C, T>(elements_at<T>(problem.key.base, s.index), segment.num_keys, shape.keys, problem.dim,
                        s.key_transposed);
  token_offsets(problem.value, segment.keys, segment.num_keys, group, s.index);
  pack_straight<C, T>(elements_at<T>(problem.value.base, s.index), segment.num_keys, key_words, problem.dim,
                      s.value_straight);
  for (int64_t token = 0; token < segment.length; token += shape.tokens) {
    const int64_t rest = segment.length - token, count = rest < shape.tokens ? rest : shape.tokens;
    const int64_t rows = count * heads, first = segment.start + token, place = before + token;
    const Seen seen = seen_by<C>(problem, place, count, shape.keys);
    row_offsets(problem.query, first, count, group, heads, s.index);
    pack_left<C, T>(elements_at<T>(problem.query.base, s.index), rows, problem.dim, s.query);
    scores_of<C>(shape, rows, seen, s.query, s.key_transposed, s.scores);
    alignas(64) float inverse[attention_rows];
    for (int64_t r = 0; r < rows; ++r) {
      float sum;
      const float largest = exponentials<C>(problem, s.scores + r * shape.stride, seen_at(problem, place + r / heads),
                                            seen, s.p + r * p_words, &sum);
      problem.lse[(first + r / heads) * problem.num_heads + group * heads + r % heads] = largest + logf(sum);
      inverse[r] = 1.0f / sum;
    }
    for (int64_t r = rows; r < round_up(rows, Vec::MR); ++r) {
      __builtin_memset(s.p + r * p_words, 0, p_words * sizeof(uint32_t));
    }
    product_of_some<C>(rows, shape.columns, seen.first / C::group, seen.last / C::group, s.p, p_words,
                       s.value_straight, key_words, s.product, shape.columns, false);
    row_offsets(problem.out, first, count, group, heads, s.index);
    for (int64_t r = 0; r < rows; ++r) {
      char* to = static_cast<char*>(problem.out.base) + s.index[r] * element_bytes<T>;
      const F factor = Vec::set1(inverse[r]);
      for (int64_t j = 0; j < shape.columns; j += W) {
        store_some<T>(to + j * element_bytes<T>, Vec::mul(Vec::load(s.product + r * shape.columns + j), factor),
                      problem.dim - j);
      }
    }
  }
}

// out[key, row words]: the transpose of rows [0, rows) of a matrix, as a left operand whose summed dimension is the rows.
template <class C>
static inline void transposed_words(const float* matrix, int64_t stride, Seen keys, int64_t rows, uint32_t* out) {
  const int64_t words = rows / C::group;
  for (int64_t key = keys.first; key < keys.last; key += W) {
    for (int64_t k = 0; k < words; k += W) {
      I block[W];
      const int64_t some = words - k < W ? words - k : W;
      for (int64_t i = 0; i < W; ++i) {
        const float* row = matrix + (k + i) * C::group * stride + key;
        if (i >= some) {
          block[i] = Vec::zero_words();
        } else if constexpr (C::group == 2) {
          block[i] = Vec::pair(Vec::bf16_bits(Vec::load(row)), Vec::bf16_bits(Vec::load(row + stride)));
        } else {
          block[i] = Vec::as_words(Vec::load(row));
        }
      }
      Vec::transpose(block);
      for (int64_t i = 0; i < W; ++i) {
        if (some == W) {
          Vec::store_words(out + (key + i) * words + k, block[i]);
          continue;
        }
        alignas(64) uint32_t end[W];
        Vec::store_words(end, block[i]);
        __builtin_memcpy(out + (key + i) * words + k, end, some * sizeof(uint32_t));
      }
    }
  }
}

// dkey and dvalue are this segment's own [padded keys, padded dim] sums, zero before.
template <class C, DType T>
static void attention_backward_of(const AttentionProblem& problem, const AttentionSegment& segment, int64_t group,
                                  float* dkey, float* dvalue, char* base) {
  const int64_t before = segment.num_keys - segment.length;
  const AttentionShape<C> shape(problem, segment.num_keys, segment.length);
  const AttentionScratch<C> s(shape, true, base);
  const int64_t key_words = shape.keys / C::group, p_words = shape.stride / C::group, heads = problem.heads;
  token_offsets(problem.key, segment.keys, segment.num_keys, group, s.index);
  const Rows key = elements_at<T>(problem.key.base, s.index);
  pack_transposed<C, T>(key, segment.num_keys, shape.keys, problem.dim, s.key_transposed);
  pack_straight<C, T>(key, segment.num_keys, key_words, problem.dim, s.key_straight);
  token_offsets(problem.value, segment.keys, segment.num_keys, group, s.index);
  pack_transposed<C, T>(elements_at<T>(problem.value.base, s.index), segment.num_keys, shape.keys, problem.dim,
                        s.value_transposed);
  for (int64_t token = 0; token < segment.length; token += shape.tokens) {
    const int64_t rest = segment.length - token, count = rest < shape.tokens ? rest : shape.tokens;
    const int64_t rows = count * heads, first = segment.start + token, place = before + token;
    const int64_t padded = round_up(rows, W), row_words = padded / C::group;
    const Seen seen = seen_by<C>(problem, place, count, shape.keys);
    row_offsets(problem.query, first, count, group, heads, s.index);
    const Rows query = elements_at<T>(problem.query.base, s.index);
    pack_left<C, T>(query, rows, problem.dim, s.query);
    pack_straight<C, T>(query, rows, row_words, problem.dim, s.query_straight);
    row_offsets(problem.dout, first, count, group, heads, s.index);
    const Rows dout = elements_at<T>(problem.dout.base, s.index);
    pack_left<C, T>(dout, rows, problem.dim, s.dout);
    pack_straight<C, T>(dout, rows, row_words, problem.dim, s.dout_straight);
    scores_of<C>(shape, rows, seen, s.query, s.key_transposed, s.scores);
    scores_of<C>(shape, rows, seen, s.dout, s.value_transposed, s.dp);
    for (int64_t r = 0; r < padded; ++r) {
      float *p = s.scores + r * shape.stride, *dp = s.dp + r * shape.stride;
      if (r >= rows) {
        zero_outside(p, {seen.first, seen.first}, seen);
        zero_outside(dp, {seen.first, seen.first}, seen);
        continue;
      }
      const Seen inside = seen_at(problem, place + r / heads);
      const int64_t start = inside.first / W * W, end = round_up(inside.last, W);
      const F scale = Vec::set1(problem.scale);
      const F lse = Vec::set1(problem.lse[(first + r / heads) * problem.num_heads + group * heads + r % heads]);
      zero_outside(dp, inside, seen);
      F sum = Vec::zero();
      for (int64_t j = start; j < end; j += W) {
        Vec::store(p + j, exp_(Vec::sub(Vec::mul(Vec::load(p + j), scale), lse)));
      }
      zero_outside(p, inside, seen);
      for (int64_t j = start; j < end; j += W) sum = Vec::fma(Vec::load(p + j), Vec::load(dp + j), sum);
      const F delta = Vec::set1(Vec::hsum(sum));
      for (int64_t j = start; j < end; j += W) {
        const F weight = Vec::mul(Vec::load(p + j), scale);
        Vec::store(dp + j, Vec::mul(weight, Vec::sub(Vec::load(dp + j), delta)));
      }
      round_row<C>(dp, seen, s.p + r * p_words);
    }
    transposed_words<C>(s.scores, shape.stride, seen, padded, s.p_transposed);
    transposed_words<C>(s.dp, shape.stride, seen, padded, s.ds_transposed);
    const int64_t at = seen.first * shape.columns, num_seen = seen.last - seen.first;
    product_of_some<C>(num_seen, shape.columns, 0, row_words, s.p_transposed + seen.first * row_words, row_words,
                       s.dout_straight, row_words, dvalue + at, shape.columns, true);
    product_of_some<C>(num_seen, shape.columns, 0, row_words, s.ds_transposed + seen.first * row_words, row_words,
                       s.query_straight, row_words, dkey + at, shape.columns, true);
    for (int64_t r = rows; r < round_up(rows, Vec::MR); ++r) {
      __builtin_memset(s.p + r * p_words, 0, p_words * sizeof(uint32_t));
    }
    product_of_some<C>(rows, shape.columns, seen.first / C::group, seen.last / C::group, s.p, p_words,
                       s.key_straight, key_words, s.product, shape.columns, false);
    row_offsets(problem.dquery, first, count, group, heads, s.index);
    for (int64_t r = 0; r < rows; ++r) {
      char* to = static_cast<char*>(problem.dquery.base) + s.index[r] * element_bytes<T>;
      for (int64_t j = 0; j < shape.columns; j += W) {
        store_some<T>(to + j * element_bytes<T>, Vec::load(s.product + r * shape.columns + j), problem.dim - j);
      }
    }
  }
}

}  // namespace FLOW_ISA
}  // namespace flow_kernels
