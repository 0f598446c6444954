// The linear head, a tile of the vocabulary at a time.
//
// forward: pack the tile's rows of linear_weight once, multiply all rows with it, fold the logits into the rows'
//   statistics while they are in cache.
// backward: per tile, gradients of the logits (from what was kept, or from the product made again) rounded to the
//   words of the next products, then dinput += P W and dweight[tile] = P^T input while P is in cache. A tile's dweight
//   is complete after its last row, so it is rounded once and never needs a second buffer the size of the head. With
//   grad_filter_eps, both products are of the classes that matter (grad_filter.h).
//
// Blocks measured at N=1024, D=640, V=262144 on a Zen 4 core (1 MiB of L2). On one such core (V=16384, CPU time) the
// forward pass multiplies at 205 of the 234 GFLOP/s that vdpbf16ps reaches from registers, exponentials included, and
// loss, dinput and dweight take 2.98 times as long as the forward pass where everything is kept. Several narrow tiles to
// a product of the backward pass, up to 480 classes (1920 with a filter), were tried: 2.5 % at D=2304, nothing elsewhere.
#pragma once
#include "api.h"
#include "scratch.h"

namespace flow_kernels {
namespace FLOW_ISA {

// Rows whose probabilities are held at a time: P and its pairs are 2 x 1024 x tile words.
constexpr int64_t row_block = 1024;
// The packed tile stays in L2 beside the logits of a few rows.
constexpr int64_t tile_bytes = 512 * 1024;
constexpr int64_t max_tile = 480;

template <class C>
constexpr int64_t logit_rows = C::uses_brgemm ? 64 : 2 * Vec::MR;

template <class C>
static int64_t tile_width(int64_t dim) {
  const int64_t panel = panel_columns<C>;
  const int64_t words = dim > 0 ? (dim + C::group - 1) / C::group : 1;
  const int64_t fits = tile_bytes / (4 * words) / panel * panel;
  return fits < panel ? panel : fits < max_tile ? fits : max_tile / panel * panel;
}

// Few rows: packing a tile for them costs as much as multiplying them with it. The product is made the other way round,
// classes down and rows across, with the weight's words read where they lie; bit for bit the same. Scoring against
// packed tiles, D=640 in bf16, V=262144 (65536 from 96 rows on), 2 Zen 4 cores: 1 row 0.48 of the time (and 0.58 of
// torch.mm's), 16 0.45, 64 0.65, 96 0.84, 128 0.88, 256 0.95; with all gradients 0.77, 0.77, 0.97, 0.93 from 16 to 128.
// At 512 rows scoring gains nothing more and the gradients lose up to 9 %.
constexpr int64_t narrow_rows = 256;

template <class C>
static inline bool is_narrow(int64_t num_rows, int64_t dim, DType weight_dtype) {
  const bool has_words = C::group == 2 ? weight_dtype == DType::bf16 && dim % 2 == 0 : weight_dtype == DType::f32;
  return !C::uses_brgemm && has_words && num_rows <= narrow_rows && round_up(num_rows, W) <= dim / C::group;
}

// A thread's scratch, cut into its buffers.
template <class C>
struct Scratch {
  uint32_t *weight_transposed, *weight_straight, *p, *p_pairs, *p_row_major, *active;
  int64_t* active_index;
  float *logits, *dweight, *dweight_active;
  int64_t bytes = 0;

  Scratch(const HeadProblem& problem, bool backward, char* base) {
    const int64_t words = (problem.dim + C::group - 1) / C::group, tile = problem.tile;
    const int64_t columns = round_up(problem.dim, W);
    const int64_t rows = problem.num_rows < row_block ? round_up(problem.num_rows, Vec::MR) : row_block;
    const int64_t p_words = backward ? rows * tile / C::group : 0;
    const bool filter = backward && problem.grad_filter_eps > 0;
    Room room{base};
    weight_transposed = room.take<uint32_t>(tile * words);
    logits = room.take<float>(logit_rows<C> * tile);
    p = room.take<uint32_t>(problem.need_dinput || filter ? p_words : 0);
    weight_straight = room.take<uint32_t>(backward && problem.need_dinput ? tile / C::group * columns : 0);
    p_pairs = room.take<uint32_t>(problem.dweight != nullptr ? p_words : 0);
    p_row_major = room.take<uint32_t>(problem.dweight != nullptr && C::uses_brgemm ? p_words : 0);
    const bool in_blocks = backward && problem.dweight != nullptr && problem.num_rows > row_block;
    dweight = room.take<float>(in_blocks ? tile * columns : 0);
    dweight_active = room.take<float>(in_blocks && filter ? tile * columns : 0);
    active = room.take<uint32_t>(filter ? tile : 0);
    active_index = room.take<int64_t>(filter ? tile : 0);
    bytes = room.bytes;
  }
};

template <class C>
static int64_t scratch_bytes(const HeadProblem& problem, bool backward) {
  return Scratch<C>(problem, backward, nullptr).bytes;
}

// The kept tiles are spread evenly, so that threads with equal shares of tiles have equal work.
static inline int64_t kept_before(const Kept& kept, int64_t tile, int64_t num_tiles) {
  return tile * kept.num_kept / num_tiles;
}
static inline bool is_kept(const Kept& kept, int64_t tile, int64_t num_tiles) {
  return kept_before(kept, tile, num_tiles) != kept_before(kept, tile + 1, num_tiles);
}

static inline bool is_full(const HeadProblem& problem, int64_t tile) {
  return (tile + 1) * problem.tile <= problem.num_classes;
}

// Where the exponentials (or logits) of a row in a tile are kept and what was subtracted; null if they are not kept.
struct KeptRow {
  char* values;
  float* shift;
};

static inline KeptRow kept_row(const HeadProblem& problem, int64_t tile, int64_t row) {
  const Kept& kept = problem.kept;
  if (row < kept.in_dweight) {
    if (!is_full(problem, tile)) return {nullptr, nullptr};
    const int64_t start = tile * problem.tile * problem.dim * bytes_of(problem.weight_dtype);
    return {static_cast<char*>(problem.dweight) + start + row * problem.tile * kept.bytes,
            kept.dweight_maxima + tile * kept.in_dweight + row};
  }
  if (!is_kept(kept, tile, problem.num_tiles)) return {nullptr, nullptr};
  const int64_t at =
      kept_before(kept, tile, problem.num_tiles) * (problem.num_rows - kept.in_dweight) + row - kept.in_dweight;
  return {kept.values + at * problem.tile * kept.bytes, kept.maxima + at};
}

static inline bool all_rows_kept(const HeadProblem& problem, int64_t tile) {
  const bool first = problem.kept.in_dweight == 0 || is_full(problem, tile);
  return first && (problem.kept.in_dweight == problem.num_rows || is_kept(problem.kept, tile, problem.num_tiles));
}

static inline Rows tile_of_weight(const HeadProblem& problem, int64_t v0) {
  const int64_t bytes = bytes_of(problem.weight_dtype);
  return {static_cast<const char*>(problem.weight) + v0 * problem.weight_stride * bytes, problem.weight_stride * bytes,
          nullptr};
}

static inline int64_t tile_classes(const HeadProblem& problem, int64_t tile) {
  const int64_t rest = problem.num_classes - tile * problem.tile;
  return rest < problem.tile ? rest : problem.tile;
}

// Logits of rows [row, row + count) in one tile, left in s.logits with a row stride of n_padded.
template <class C>
static void tile_logits(const HeadProblem& problem, const Scratch<C>& s, int64_t row, int64_t count, int64_t v0,
                        int64_t n) {
  const int64_t words = (problem.dim + C::group - 1) / C::group, padded = round_up(n, W);
  if (is_narrow<C>(problem.num_rows, problem.dim, problem.weight_dtype)) {
    const int64_t across = round_up(problem.num_rows, W);
    for (int64_t r = 0; r < count; r += W) {
      for (int64_t j = 0; j < padded; j += W) {
        I block[W];
        for (int64_t i = 0; i < W; ++i) block[i] = Vec::load_words(s.weight_transposed + (j + i) * across + row + r);
        Vec::transpose(block);
        const int64_t rest = count - r < W ? count - r : W;
        for (int64_t i = 0; i < rest; ++i) Vec::store_words(s.logits + (r + i) * padded + j, block[i]);
      }
    }
  } else {
    product<C>(row, round_up(count, Vec::MR), padded, words, left_view<C>(problem.rows_a, words), s.weight_transposed,
               s.logits, padded, false);
  }
  const float* bias = problem.bias == nullptr ? nullptr : problem.bias + v0;
  for (int64_t r = 0; r < count; ++r) finish_logits(s.logits + r * padded, n, bias, problem.loss.softcap);
}

// What the logits of a tile are made from, in s.weight_transposed: its classes packed as the right operand, or for few
// rows [classes, rows] the products themselves.
template <class C, DType T>
static void prepare_logits(const HeadProblem& problem, const Scratch<C>& s, Rows weight, int64_t n) {
  if (is_narrow<C>(problem.num_rows, problem.dim, problem.weight_dtype)) {
    narrow_product<C>(weight, n, round_up(problem.num_rows, W), problem.dim / C::group, problem.rows_a,
                      reinterpret_cast<float*>(s.weight_transposed));
  } else {
    pack_transposed<C, T>(weight, n, round_up(n, W), problem.dim, s.weight_transposed);
  }
}

template <class C, DType T>
static void forward_tiles(const HeadProblem& problem, int64_t first, int64_t last, RowStats* stats, char* scratch) {
  const Scratch<C> s(problem, false, scratch);
  for (int64_t r = 0; r < problem.num_rows; ++r) stats[r] = {-INFINITY, 0.0f, 0.0f, 0.0f};
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t v0 = tile * problem.tile, n = tile_classes(problem, tile), padded = round_up(n, W);
    prepare_logits<C, T>(problem, s, tile_of_weight(problem, v0), n);
    const float* weight = problem.loss.class_weight == nullptr ? nullptr : problem.loss.class_weight + v0;
    for (int64_t row = 0; row < problem.num_rows; row += logit_rows<C>) {
      const int64_t rest = problem.num_rows - row, count = rest < logit_rows<C> ? rest : logit_rows<C>;
      tile_logits<C>(problem, s, row, count, v0, n);
      for (int64_t i = row; i < row + count; ++i) {
        float* z = s.logits + (i - row) * padded;
        const int64_t t = problem.rows.target[i] - v0;
        if (t >= 0 && t < n) {
          problem.rows.target_logit[i] = z[t];
          const float before = max_of(z, t);
          problem.rows.max_before[i] = before > stats[i].max ? before : stats[i].max;
        }
        const KeptRow kept = kept_row(problem, tile, i);
        if (kept.values != nullptr && problem.kept.logits) {
          __builtin_memcpy(kept.values, z, padded * sizeof(float));
          add_to_stats(z, n, t, weight, problem.loss, stats[i], nullptr, 0);
          continue;
        }
        const float shift = add_to_stats(z, n, t, weight, problem.loss, stats[i], kept.values, problem.kept.bytes);
        if (kept.values != nullptr) *kept.shift = shift;
      }
    }
  }
}

// Round the gradients of two rows (one, for words of one element) to the operands of both products.
template <class C>
static inline void write_probabilities(const Scratch<C>& s, bool dinput, bool dweight, const float* d, int64_t padded,
                                       int64_t r, int64_t k_words) {
  for (int64_t j = 0; j < padded; j += W) {
    const F d0 = Vec::load(d + j);
    if constexpr (C::group == 2) {
      const F d1 = Vec::load(d + padded + j);
      uint16_t* rows = reinterpret_cast<uint16_t*>(s.p);
      if (dinput) {
        Vec::store_bf16(rows + r * padded + j, d0);
        Vec::store_bf16(rows + (r + 1) * padded + j, d1);
      }
      if (dweight) {
        Vec::store_words(s.p_pairs + j * k_words + r / 2 * W, Vec::pair(Vec::bf16_bits(d0), Vec::bf16_bits(d1)));
      }
    } else {
      if (dinput) Vec::store_words(s.p + r * padded + j, Vec::as_words(d0));
      if (dweight) Vec::store_words(s.p_pairs + j * k_words + r * W, Vec::as_words(d0));
    }
  }
}

// P of rows [row0, row0 + count) in one tile, in the layouts of the products to come; padding rows are 0. With a filter
// row-major only, and the classes that matter are flagged.
template <class C>
static void tile_probabilities(const HeadProblem& problem, const Scratch<C>& s, int64_t row0, int64_t count,
                               int64_t tile) {
  const int64_t v0 = tile * problem.tile, n = tile_classes(problem, tile), padded = round_up(n, W);
  const int64_t k_words = round_up(count, Vec::MR) / C::group;
  const bool filter = problem.grad_filter_eps > 0;
  const bool dinput = problem.need_dinput || filter, dweight = problem.dweight != nullptr && !filter;
  if (filter) __builtin_memset(s.active, 0, padded * sizeof(uint32_t));
  for (int64_t row = 0; row < count; row += logit_rows<C>) {
    const int64_t some = count - row < logit_rows<C> ? count - row : logit_rows<C>;
    // The same for all of them: kept.in_dweight is a multiple of logit_rows or all rows.
    const bool is_kept_block = kept_row(problem, tile, row0 + row).values != nullptr;
    if (!is_kept_block) tile_logits<C>(problem, s, row0 + row, some, v0, n);
    for (int64_t r = 0; r < round_up(some, Vec::MR); ++r) {
      float* d = s.logits + r * padded;
      if (r < some) {
        const int64_t i = row0 + row + r;
        const RowGradient gradient(problem.loss, problem.rows.row_scale[i], problem.rows.lse[i],
                                   problem.rows.target[i]);
        KeptRow kept = kept_row(problem, tile, i);
        if (kept.values != nullptr && problem.kept.logits) {
          __builtin_memcpy(d, kept.values, padded * sizeof(float));
          kept.values = nullptr;
        }
        row_gradient(d, n, v0, problem.loss, gradient, problem.rows.log_p == nullptr ? nullptr : problem.rows.log_p + i,
                     kept.values, problem.kept.bytes, kept.values != nullptr ? *kept.shift : 0.0f);
        if (filter) mark_active(d, padded, problem.grad_filter_eps * fabsf(gradient.g), s.active);
        if (problem.dbias != nullptr) {
          for (int64_t j = 0; j < n; ++j) problem.dbias[v0 + j] += d[j];
        }
      } else {
        for (int64_t j = 0; j < padded; ++j) d[j] = 0.0f;
      }
      if (r % C::group == C::group - 1) {
        write_probabilities(s, dinput, dweight, d - (C::group - 1) * padded, padded, row + r - (C::group - 1), k_words);
      }
    }
  }
}

// The left operand of dweight: P^T, its pairs of rows in vectors of W classes (transposed to rows for brgemm).
template <class C>
static AView transposed_probabilities(const Scratch<C>& s, int64_t padded, int64_t k_words) {
  if constexpr (!C::uses_brgemm) return {s.p_pairs, W, W * k_words, 1, W};
  for (int64_t v = 0; v < padded; v += W) {
    for (int64_t k = 0; k < k_words; k += W) {
      I block[W];
      const int64_t some = k_words - k < W ? k_words - k : W;
      for (int64_t i = 0; i < W; ++i) {
        block[i] = i < some ? Vec::load_words(s.p_pairs + v * k_words + (k + i) * W) : Vec::zero_words();
      }
      Vec::transpose(block);
      for (int64_t i = 0; i < W; ++i) {
        uint32_t* to = s.p_row_major + (v + i) * k_words + k;
        if (some == W) {
          Vec::store_words(to, block[i]);
          continue;
        }
        alignas(64) uint32_t words[W];
        Vec::store_words(words, block[i]);
        __builtin_memcpy(to, words, some * 4);
      }
    }
  }
  return {s.p_row_major, INT64_MAX, 0, k_words, 1};
}

// What one tile of the backward pass adds to, and from where.
struct Tile {
  int64_t num_classes, padded;
  Rows weight;
  char* dweight;  // its rows of dweight, or null
  int64_t dweight_stride;
};

// dinput += P W and dweight = P^T input, of rows [row, row + count) and all classes of the tile.
template <class C, DType T>
static void add_products(const HeadProblem& problem, const Scratch<C>& s, const Tile& tile, int64_t row, int64_t count,
                         float* dinput, bool add) {
  const int64_t columns = round_up(problem.dim, W), rows = round_up(count, Vec::MR), k_words = rows / C::group;
  if (problem.need_dinput) {
    const AView p{s.p, INT64_MAX, 0, tile.padded / C::group, 1};
    product<C>(0, rows, columns, tile.padded / C::group, p, s.weight_straight, dinput + row * columns, columns, add);
  }
  if (tile.dweight == nullptr) return;
  const AView p = transposed_probabilities<C>(s, tile.padded, k_words);
  const uint32_t* rows_b = problem.rows_b + row / C::group * columns;
  if (problem.num_rows > row_block) {
    product<C>(0, tile.padded, columns, k_words, p, rows_b, s.dweight, columns, row > 0);
  } else {
    product_rounded<C, T>(tile.num_classes, problem.dim, k_words, p, rows_b, tile.dweight, tile.dweight_stride);
  }
}

// The same of the classes flagged in s.active only; dinput is added to, dweight of the others is 0.
template <class C, DType T>
static void add_active_products(const HeadProblem& problem, const Scratch<C>& s, const Tile& tile, int64_t row,
                                int64_t count, float* dinput) {
  const int64_t columns = round_up(problem.dim, W), rows = round_up(count, Vec::MR), k_words = rows / C::group;
  const bool in_blocks = problem.num_rows > row_block;
  if (tile.dweight != nullptr && in_blocks && row == 0) {
    __builtin_memset(s.dweight, 0, tile.num_classes * columns * sizeof(float));
  } else if (tile.dweight != nullptr && !in_blocks) {
    __builtin_memset(tile.dweight, 0, tile.num_classes * tile.dweight_stride);
  }
  const int64_t active = list_active(s.active, tile.num_classes, s.active_index);
  const int64_t padded = padded_active<C>(active, tile.padded);
  if (active == 0) return;
  gather_active<C>(s.active_index, active, padded, rows, tile.padded, s.p,
                   tile.dweight == nullptr ? nullptr : s.p_pairs);
  if (problem.need_dinput) {
    const Rows weight{tile.weight.base, tile.weight.stride_bytes, s.active_index};
    pack_straight<C, T>(weight, active, padded / C::group, problem.dim, s.weight_straight);
    const AView p{s.p, INT64_MAX, 0, padded / C::group, 1};
    product<C>(0, rows, columns, padded / C::group, p, s.weight_straight, dinput + row * columns, columns, true);
  }
  if (tile.dweight == nullptr) return;
  const AView p = transposed_probabilities<C>(s, padded, k_words);
  const uint32_t* rows_b = problem.rows_b + row / C::group * columns;
  if (!in_blocks) {
    product_rounded<C, T>(active, problem.dim, k_words, p, rows_b, tile.dweight, tile.dweight_stride, s.active_index);
    return;
  }
  product<C>(0, padded, columns, k_words, p, rows_b, s.dweight_active, columns, false);
  for (int64_t c = 0; c < active; ++c) {
    float *to = s.dweight + s.active_index[c] * columns, *from = s.dweight_active + c * columns;
    for (int64_t j = 0; j < columns; j += W) Vec::store(to + j, Vec::add(Vec::load(to + j), Vec::load(from + j)));
  }
}

template <class C, DType T>
static void backward_tiles(const HeadProblem& problem, int64_t first, int64_t last, float* dinput, char* scratch) {
  const Scratch<C> s(problem, true, scratch);
  const int64_t columns = round_up(problem.dim, W);
  const int64_t dweight_stride = problem.dim * element_bytes<T>;
  const bool filter = problem.grad_filter_eps > 0;
  if (filter && problem.need_dinput && columns > 0) {  // memset of a null pointer is undefined even for 0 bytes
    __builtin_memset(dinput, 0, round_up(problem.num_rows, Vec::MR) * columns * sizeof(float));
  }
  for (int64_t t = first; t < last; ++t) {
    const int64_t v0 = t * problem.tile, n = tile_classes(problem, t);
    char* dweight = problem.dweight == nullptr ? nullptr : static_cast<char*>(problem.dweight) + v0 * dweight_stride;
    const Tile tile{n, round_up(n, W), tile_of_weight(problem, v0), dweight, dweight_stride};
    if (!all_rows_kept(problem, t)) prepare_logits<C, T>(problem, s, tile.weight, n);
    if (problem.need_dinput && !filter) {
      pack_straight<C, T>(tile.weight, n, tile.padded / C::group, problem.dim, s.weight_straight);
    }
    for (int64_t row = 0; row < problem.num_rows; row += row_block) {
      const int64_t rest = problem.num_rows - row, count = rest < row_block ? rest : row_block;
      tile_probabilities<C>(problem, s, row, count, t);
      if (filter) {
        add_active_products<C, T>(problem, s, tile, row, count, dinput);
      } else {
        add_products<C, T>(problem, s, tile, row, count, dinput, t > first);
      }
    }
    if (dweight == nullptr || problem.num_rows <= row_block) continue;
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t j = 0; j < problem.dim; j += W) {
        store_some<T>(dweight + r * dweight_stride + j * element_bytes<T>, Vec::load(s.dweight + r * columns + j),
                      problem.dim - j);
      }
    }
  }
}

}  // namespace FLOW_ISA
}  // namespace flow_kernels
