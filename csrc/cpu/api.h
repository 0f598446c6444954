// What the dispatcher (ATen) and the kernels (one translation unit per instruction set) say to each other.
//
// N rows that count, V vocabulary entries, D hidden. A "word" is 32 bits of a product's operand: two bf16 along the
// summed dimension where vdpbf16ps or AMX multiplies them (group = 2), one fp32 elsewhere (group = 1).
//
// This header and everything the kernels include is free of ATen and of standard templates: an inline function
// compiled for AVX-512 here would otherwise be the one the linker keeps for every CPU.
#pragma once
#include <math.h>

#include <cstdint>

namespace flow_kernels {

enum class DType : int { f32, bf16, f16 };

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The options of the loss; class_weight is [V] or null, mean_class_weight is sum(class_weight) / V or 1.
struct LossOptions {
  const float* class_weight;
  float mean_class_weight;
  float label_smoothing;
  float softcap;
  float z_loss;
  int64_t num_classes;
  bool need_entropy;
};

// What a stretch of the vocabulary has added to one row: max and sum of exp(z - max) over the classes other than the
// target, sum of class_weight * z over all; for the entropy, sum of exp(z - max) (z - max) over the others.
struct RowStats {
  float max;
  float sum;
  float smooth;
  float product;
};

// The same of a whole row, and its target.
struct RowTotals {
  float max = -INFINITY;
  double sum = 0, smooth = 0, product = 0;
  float target_logit = 0, max_before = -INFINITY;
};

// The loss of the rows and what their gradients need, [N] each; log_p is null in a backward pass that only has
// lse, which is fp64: the target's log-probability is what is left of its logit.
struct RowResults {
  const int64_t* target;
  float* target_logit;
  float* max_before;  // largest logit in front of the target within its stretch: decides ties of the argmax
  const double* lse;
  const float* log_p;      // log-probability of the target, exact near 0
  const float* row_scale;  // g
};

// Exponentials kept by the forward pass so that the backward pass need not multiply again. The first rows' lie where
// dweight will be: a tile's are used up before its dweight is written. The other rows' have a buffer, for some tiles.
// With a soft-cap, whose derivative needs them, it is the logits themselves.
struct Kept {
  bool logits;              // fp32 logits, and no maxima
  int bytes;                // 1, 2 or 4, as rows.h says
  int64_t in_dweight;       // rows kept in dweight, in every full tile
  float* dweight_maxima;    // [num_tiles, in_dweight]: what was subtracted
  char* values;             // [num_kept, N - in_dweight, tile]
  float* maxima;            // [num_kept, N - in_dweight]
  int64_t num_kept;
};

struct HeadProblem {
  int64_t num_rows, num_classes, dim;
  DType dtype, weight_dtype;  // of the input; and of weight and dweight, which may be fp32 beside a narrower input
  const void* weight;         // [V, D]
  int64_t weight_stride;
  const float* bias;  // [V] or null
  const uint32_t* rows_a;  // the input, packed as the left operand of the logits
  const uint32_t* rows_b;  // the input, packed as the right operand of the weight gradient; null without one
  int64_t tile, num_tiles;
  LossOptions loss;
  RowResults rows;
  Kept kept;
  // A class whose |dloss/dproduct|, before row_scale, is below this in all rows of a block is left out of dinput and
  // dweight; 0 keeps all.
  float grad_filter_eps;
  // for gradients; dweight holds kept exponentials during the forward pass
  bool need_dinput;
  void* dweight;   // [V, D] contiguous in weight_dtype, or null
  float* dbias;    // [V] or null
};

// Heads of tokens in memory, strides in elements; the elements of a head lie side by side.
struct HeadsView {
  void* base;
  int64_t token_stride, head_stride;
};

// Attention of a packed row. `heads` query heads share a key head, num_heads are all of them. lse is [N, num_heads]; dout
// and dquery are of the backward pass only, and out of the forward pass. 0 is no window.
struct AttentionProblem {
  DType dtype;
  int64_t num_heads, heads, dim, window;
  float scale;
  HeadsView query, key, value, out, dout, dquery;
  float* lse;
};

// Keys of a segment are padded to this at most, in sums over them always.
constexpr int64_t attention_key_multiple = 64;

// Tokens [start, start + length) and the tokens they see: those of the segments before, then their own.
struct AttentionSegment {
  int64_t start, length, num_keys;
  const int64_t* keys;
};

// One product C[M, width] (+)= A[M, K] B[K, width] of bf16 by the CPU's matrix unit, A row-major, B in pairs of K.
using BrgemmFn = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                          const void* a, const void* b, float* c);

// The kernels of one instruction set for one kind of word.
struct Kernels {
  const char* name;
  int group;            // elements per word
  int64_t width;        // fp32 lanes of a vector
  int64_t row_multiple;  // rows are padded to this
  int64_t (*tile_width)(int64_t dim);
  // Bytes of scratch one thread needs; `backward` adds the probabilities, the second packing and dweight's tile.
  int64_t (*scratch_bytes)(const HeadProblem&, bool backward);
  // input[index[i]] for i < num_rows, as left operand [num_rows padded, D] and right operand [num_rows, D].
  void (*pack_rows_a)(const void* input, int64_t stride, const int64_t* index, int64_t num_rows, int64_t dim, DType,
                      DType weight_dtype, uint32_t* out);
  void (*pack_rows_b)(const void* input, int64_t stride, const int64_t* index, int64_t num_rows, int64_t dim, DType,
                      uint32_t* out);
  // Statistics of tiles [first, last) for every row, stats is [N].
  void (*forward)(const HeadProblem&, int64_t first, int64_t last, RowStats* stats, char* scratch);
  // Gradients of tiles [first, last); dinput is this thread's [N padded, D padded] fp32 sum.
  void (*backward)(const HeadProblem&, int64_t first, int64_t last, float* dinput, char* scratch);
  // out[index[i], :] = sum over `parts` of dinput[part][i, :], for rows [first, last).
  void (*finish_dinput)(const float* dinput, int64_t parts, int64_t part_stride, int64_t dim, const int64_t* index,
                        int64_t first, int64_t last, DType, void* out, int64_t out_stride);
  // Given logits of one row [V]: its statistics, and its gradient in dtype.
  RowTotals (*row_totals)(const void* logits, DType, int64_t target, const LossOptions&);
  void (*row_gradient)(const void* logits, DType, int64_t target, const LossOptions&, double lse, const float* log_p,
                       float row_scale, void* out);
  // Attention of one segment by the query heads of one key head; `forward` writes out and lse, `backward` dquery and,
  // added to zeros, [num_keys and dim padded to `width`] sums of dkey and dvalue.
  int64_t (*attention_scratch_bytes)(const AttentionProblem&, int64_t num_keys, int64_t num_queries, bool backward);
  void (*attention_forward)(const AttentionProblem&, const AttentionSegment&, int64_t group, char* scratch);
  void (*attention_backward)(const AttentionProblem&, const AttentionSegment&, int64_t group, float* dkey, float* dvalue,
                             char* scratch);
};

// Null where this build or CPU has no such kernels. Defined one per translation unit.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* brgemm_kernels(BrgemmFn product);

}  // namespace flow_kernels
