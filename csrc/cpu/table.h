// The kernels of one instruction set as the table the dispatcher sees: dtypes turned into template arguments, the
// functions over given logits, and the last step of the input gradient.
#pragma once
#include "api.h"

namespace flow_kernels {
namespace FLOW_ISA {

// Calls function<C, T>(...) for the dtype at hand, where a word of two elements holds two bf16 of memory.
#define FLOW_WITH_DTYPE(dtype, function, ...)                                      \
  if constexpr (C::group == 2) {                                                   \
    function<C, DType::bf16>(__VA_ARGS__);                                         \
  } else {                                                                         \
    switch (dtype) {                                                               \
      case DType::f32: function<C, DType::f32>(__VA_ARGS__); break;                \
      case DType::bf16: function<C, DType::bf16>(__VA_ARGS__); break;              \
      case DType::f16: function<C, DType::f16>(__VA_ARGS__); break;                \
    }                                                                              \
  }

// Calls function<C, T>(...) for the dtype of linear_weight: words of two bf16 are also made of fp32.
#define FLOW_WITH_WEIGHT_DTYPE(dtype, function, ...)       \
  if (C::group == 2 && dtype == DType::f32) {              \
    function<C, DType::f32>(__VA_ARGS__);                  \
  } else {                                                 \
    FLOW_WITH_DTYPE(dtype, function, __VA_ARGS__)          \
  }

static inline Rows gathered(const void* input, int64_t stride, const int64_t* index, DType dtype) {
  return {static_cast<const char*>(input), stride * bytes_of(dtype), index};
}

template <class C>
static void pack_rows_a(const void* input, int64_t stride, const int64_t* index, int64_t num_rows, int64_t dim,
                        DType dtype, DType weight_dtype, uint32_t* out) {
  if (is_narrow<C>(num_rows, dim, weight_dtype)) {
    FLOW_WITH_DTYPE(dtype, pack_transposed, gathered(input, stride, index, dtype), num_rows, round_up(num_rows, W), dim,
                    out)
  } else {
    FLOW_WITH_DTYPE(dtype, pack_left, gathered(input, stride, index, dtype), num_rows, dim, out)
  }
}

// Blocks of row_block rows, each packed on its own.
template <class C>
static void pack_rows_b(const void* input, int64_t stride, const int64_t* index, int64_t num_rows, int64_t dim,
                        DType dtype, uint32_t* out) {
  for (int64_t row = 0; row < num_rows; row += row_block) {
    const int64_t rest = num_rows - row, count = rest < row_block ? rest : row_block;
    FLOW_WITH_DTYPE(dtype, pack_straight, gathered(input, stride, index + row, dtype), count,
                    round_up(count, Vec::MR) / C::group, dim, out + row / C::group * round_up(dim, W))
  }
}

template <class C>
static void forward(const HeadProblem& problem, int64_t first, int64_t last, RowStats* stats, char* scratch) {
  FLOW_WITH_WEIGHT_DTYPE(problem.weight_dtype, forward_tiles, problem, first, last, stats, scratch)
}

template <class C>
static void backward(const HeadProblem& problem, int64_t first, int64_t last, float* dinput, char* scratch) {
  FLOW_WITH_WEIGHT_DTYPE(problem.weight_dtype, backward_tiles, problem, first, last, dinput, scratch)
}

template <class, DType T>
static void finish_rows(const float* dinput, int64_t parts, int64_t part_stride, int64_t dim, const int64_t* index,
                        int64_t first, int64_t last, void* out, int64_t out_stride) {
  const int64_t columns = round_up(dim, W);
  for (int64_t i = first; i < last; ++i) {
    char* to = static_cast<char*>(out) + index[i] * out_stride * element_bytes<T>;
    for (int64_t j = 0; j < dim; j += W) {
      F sum = Vec::load(dinput + i * columns + j);
      for (int64_t part = 1; part < parts; ++part) {
        sum = Vec::add(sum, Vec::load(dinput + part * part_stride + i * columns + j));
      }
      store_some<T>(to + j * element_bytes<T>, sum, dim - j);
    }
  }
}

template <class C>
static void finish_dinput(const float* dinput, int64_t parts, int64_t part_stride, int64_t dim, const int64_t* index,
                          int64_t first, int64_t last, DType dtype, void* out, int64_t out_stride) {
  FLOW_WITH_DTYPE(dtype, finish_rows, dinput, parts, part_stride, dim, index, first, last, out, out_stride)
}

// logits[v0:v0 + n] of one row as fp32, soft-capped.
template <DType T>
static inline void load_stretch(const void* logits, int64_t v0, int64_t n, float softcap, float* z) {
  const char* from = static_cast<const char*>(logits) + v0 * element_bytes<T>;
  for (int64_t j = 0; j < n; j += W) {
    alignas(64) char buffer[64];
    Vec::store(z + j, load_floats<T>(padded_elements<T>(from + j * element_bytes<T>, n - j, W, buffer)));
  }
  finish_logits(z, n, nullptr, softcap);
}

template <class, DType T>
static void totals_of_row(const void* logits, int64_t target, const LossOptions& loss, RowTotals* totals) {
  alignas(64) float z[max_stretch];
  // fp32 sums over one stretch, fp64 over stretches: 262144 terms lose nothing.
  for (int64_t v0 = 0; v0 < loss.num_classes; v0 += max_stretch) {
    const int64_t rest = loss.num_classes - v0, n = rest < max_stretch ? rest : max_stretch;
    load_stretch<T>(logits, v0, n, loss.softcap, z);
    const int64_t t = target - v0;
    if (t >= 0 && t < n) {
      totals->target_logit = z[t];
      const float before = max_of(z, t);
      totals->max_before = before > totals->max ? before : totals->max;
    }
    RowStats stats{totals->max, 0.0f, 0.0f, 0.0f};
    add_to_stats(z, n, t, loss.class_weight == nullptr ? nullptr : loss.class_weight + v0, loss, stats, nullptr, 0);
    if (stats.max != totals->max) {
      const float difference = totals->max - stats.max, factor = expf(difference);
      if (totals->max != -INFINITY) totals->product += totals->sum * difference;
      totals->product *= factor;
      totals->sum *= factor;
      totals->max = stats.max;
    }
    totals->sum += stats.sum;
    totals->smooth += stats.smooth;
    totals->product += stats.product;
  }
}

template <class, DType T>
static void gradient_of_row(const void* logits, int64_t target, const LossOptions& loss, double lse, const float* log_p,
                            float row_scale, void* out) {
  alignas(64) float d[max_stretch];
  const RowGradient gradient(loss, row_scale, lse, target);
  for (int64_t v0 = 0; v0 < loss.num_classes; v0 += max_stretch) {
    const int64_t rest = loss.num_classes - v0, n = rest < max_stretch ? rest : max_stretch;
    load_stretch<T>(logits, v0, n, loss.softcap, d);
    row_gradient(d, n, v0, loss, gradient, log_p, nullptr, 0, 0.0f);
    char* to = static_cast<char*>(out) + v0 * element_bytes<T>;
    for (int64_t j = 0; j < n; j += W) store_some<T>(to + j * element_bytes<T>, Vec::load(d + j), n - j);
  }
}

static RowTotals row_totals(const void* logits, DType dtype, int64_t target, const LossOptions& loss) {
  using C = Singles;
  RowTotals totals;
  FLOW_WITH_DTYPE(dtype, totals_of_row, logits, target, loss, &totals)
  return totals;
}

static void given_row_gradient(const void* logits, DType dtype, int64_t target, const LossOptions& loss, double lse,
                               const float* log_p, float row_scale, void* out) {
  using C = Singles;
  FLOW_WITH_DTYPE(dtype, gradient_of_row, logits, target, loss, lse, log_p, row_scale, out)
}

template <class C>
static void attention_forward(const AttentionProblem& problem, const AttentionSegment& segment, int64_t group,
                              char* scratch) {
  FLOW_WITH_DTYPE(problem.dtype, attention_forward_of, problem, segment, group, scratch)
}

template <class C>
static void attention_backward(const AttentionProblem& problem, const AttentionSegment& segment, int64_t group,
                               float* dkey, float* dvalue, char* scratch) {
  FLOW_WITH_DTYPE(problem.dtype, attention_backward_of, problem, segment, group, dkey, dvalue, scratch)
}

template <class C>
static constexpr Kernels table(const char* name) {
  return {name, C::group, W, W, tile_width<C>, scratch_bytes<C>, pack_rows_a<C>, pack_rows_b<C>, forward<C>,
          backward<C>, finish_dinput<C>, row_totals, given_row_gradient, attention_scratch_bytes<C>, attention_forward<C>,
          attention_backward<C>};
}

}  // namespace FLOW_ISA
}  // namespace flow_kernels
