// Attention of a packed row: segments and key heads are independent, and each is one piece of work (attention.h).
//
// A segment that others come after gets gradients of its keys and values from each of them. Every piece has sums of its
// own for all the keys that it sees, and they are added in the order of the segments, so that results are bit-equal for
// any number of threads.
#include "operators.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "dispatch.h"

namespace flow_kernels {

namespace {

// Rows of one block hold at least all heads of one token.
constexpr int64_t max_heads = 256;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Segments and the tokens they see, from [S, 3]: first token, the one behind the last, and the segment before or -1.
struct Segments {
  std::vector<AttentionSegment> list;
  std::vector<std::vector<int64_t>> keys;
  std::vector<int64_t> of_token;  // the segment of each token

  Segments(const at::Tensor& segments, int64_t num_tokens) {
    TORCH_CHECK_VALUE(segments.dim() == 2 && segments.size(1) == 3 && segments.scalar_type() == at::kLong,
                      "segments must be int64 of shape [S, 3]");
    const at::Tensor rows = segments.contiguous();
    const int64_t* row = rows.const_data_ptr<int64_t>();
    const int64_t count = rows.size(0);
    keys.resize(count);
    of_token.resize(num_tokens);
    int64_t at = 0;
    for (int64_t s = 0; s < count; ++s, row += 3) {
      TORCH_CHECK_VALUE(row[0] == at && row[1] > at && row[1] <= num_tokens && row[2] >= -1 && row[2] < s,
                        "segment ", s, " is [", row[0], ", ", row[1], ") after segment ", row[2], ", but segments of ",
                        num_tokens, " tokens follow each other without gaps, each after an earlier one or -1");
      at = row[1];
      if (row[2] >= 0) keys[s] = keys[row[2]];
      for (int64_t t = row[0]; t < row[1]; ++t) {
        keys[s].push_back(t);
        of_token[t] = s;
      }
      list.push_back({row[0], row[1] - row[0], static_cast<int64_t>(keys[s].size()), keys[s].data()});
    }
    TORCH_CHECK_VALUE(at == num_tokens, "segments end at ", at, " and there are ", num_tokens, " tokens");
  }
};

HeadsView view_of(const at::Tensor& heads) {
  return {const_cast<void*>(heads.const_data_ptr()), heads.stride(0), heads.stride(1)};
}

struct Attention {
  at::Tensor query, key, value;
  Segments segments;
  const Kernels* kernels;
  AttentionProblem problem{};
  int64_t groups, num_tokens;
  std::vector<int64_t> order;  // pieces (segment * groups + group), the longest first

  Attention(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_, const at::Tensor& segments_,
            double scale, int64_t window, const std::string& kernels_name)
      : segments(segments_, query_.size(0)) {
    TORCH_CHECK_VALUE(query_.dim() == 3 && key_.dim() == 3 && key_.sizes() == value_.sizes() &&
                          key_.size(0) == query_.size(0) && key_.size(2) == query_.size(2) && key_.size(1) > 0 &&
                          query_.size(1) > 0 && query_.size(1) % key_.size(1) == 0 && query_.size(2) > 0,
                      "query [N, H, d] does not fit key and value [N, G, d], with H a multiple of G and d > 0: ",
                      query_.sizes(), ", ", key_.sizes(), " and ", value_.sizes());
    TORCH_CHECK_TYPE(key_.scalar_type() == query_.scalar_type() && value_.scalar_type() == query_.scalar_type(),
                     "query, key and value must have one dtype");
    num_tokens = query_.size(0);
    groups = key_.size(1);
    problem.dtype = dtype_of(query_.scalar_type(), "query");
    kernels = kernels_for(problem.dtype, kernels_name);
    TORCH_CHECK(kernels != nullptr, "this CPU has no ", kernels_name.empty() ? "AVX2" : kernels_name, " kernels for ",
                query_.scalar_type());
    problem.num_heads = query_.size(1);
    problem.heads = problem.num_heads / groups;
    TORCH_CHECK_VALUE(problem.heads <= max_heads, "at most ", max_heads, " query heads can share a key head");
    problem.dim = query_.size(2);
    problem.window = window;
    problem.scale = static_cast<float>(scale);
    query = with_elements_side_by_side(query_);
    key = with_elements_side_by_side(key_);
    value = with_elements_side_by_side(value_);
    problem.query = view_of(query);
    problem.key = view_of(key);
    problem.value = view_of(value);
    order.resize(segments.list.size() * groups);
    std::iota(order.begin(), order.end(), 0);
    const auto cost = [&](int64_t piece) {
      const AttentionSegment& segment = segments.list[piece / groups];
      return segment.length * segment.num_keys;
    };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  }

  static at::Tensor with_elements_side_by_side(const at::Tensor& heads) {
    return heads.size(2) > 1 && heads.stride(2) != 1 ? heads.contiguous() : heads;
  }

  // Calls work(segment, group, scratch) for every piece; threads take the next one when they are free.
  template <class Work>
  void for_each(bool backward, const Work& work) const {
    int64_t per_thread = 64;
    for (const AttentionSegment& segment : segments.list) {
      per_thread = std::max(
          per_thread, kernels->attention_scratch_bytes(problem, segment.num_keys, segment.length, backward));
    }
    const int64_t num_pieces = static_cast<int64_t>(order.size());
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), num_pieces);
    at::Tensor scratch = at::empty({threads * round_up(per_thread, 64)}, at::kByte);
    char* base = static_cast<char*>(scratch.mutable_data_ptr());
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const Release release(*kernels);
      for (int64_t w = begin; w < end; ++w) {
        for (int64_t i = next++; i < num_pieces; i = next++) {
          work(order[i] / groups, order[i] % groups, base + w * round_up(per_thread, 64));
        }
      }
    });
  }
};

// Sums of dkey or dvalue [G, keys of every segment, padded dim], each segment's own.
struct KeySums {
  int64_t columns, rows = 0;
  std::vector<int64_t> first_row;
  at::Tensor sums;

  KeySums(const Attention& attention) : columns(round_up(attention.problem.dim, attention.kernels->width)) {
    for (const AttentionSegment& segment : attention.segments.list) {
      first_row.push_back(rows);
      rows += round_up(segment.num_keys, attention_key_multiple);
    }
    sums = at::zeros({attention.groups, rows, columns}, at::kFloat);
  }

  float* of(int64_t segment, int64_t group) {
    return sums.mutable_data_ptr<float>() + (group * rows + first_row[segment]) * columns;
  }

  // [N, G, d] of `like`'s dtype.
  at::Tensor total(const Attention& attention, const at::Tensor& like) {
    const std::vector<AttentionSegment>& list = attention.segments.list;
    const auto row_of = [&](int64_t token, int64_t group) {
      const int64_t s = attention.segments.of_token[token];
      return of(s, group) + (list[s].num_keys - list[s].length + token - list[s].start) * columns;
    };
    at::Tensor out = at::empty({attention.num_tokens, attention.groups, attention.problem.dim}, at::kFloat);
    float* out_ptr = out.mutable_data_ptr<float>();
    for (int64_t group = 0; group < attention.groups; ++group) {
      for (int64_t s = 0; s < static_cast<int64_t>(list.size()); ++s) {
        for (int64_t j = 0; j < list[s].num_keys - list[s].length; ++j) {
          float* to = row_of(list[s].keys[j], group);
          const float* from = of(s, group) + j * columns;
          for (int64_t c = 0; c < columns; ++c) to[c] += from[c];
        }
      }
      for (int64_t token = 0; token < attention.num_tokens; ++token) {
        std::memcpy(out_ptr + (token * attention.groups + group) * attention.problem.dim, row_of(token, group),
                    attention.problem.dim * sizeof(float));
      }
    }
    return out.to(like.scalar_type());
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> packed_attention_fwd_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& segments, double scale,
    int64_t window, const std::string& kernels) {
  Attention attention(query, key, value, segments, scale, window, kernels);
  at::Tensor out = at::empty(query.sizes(), query.options());
  at::Tensor lse = at::empty({query.size(0), query.size(1)}, at::kFloat);
  attention.problem.out = view_of(out);
  attention.problem.lse = lse.mutable_data_ptr<float>();
  attention.for_each(false, [&](int64_t segment, int64_t group, char* scratch) {
    attention.kernels->attention_forward(attention.problem, attention.segments.list[segment], group, scratch);
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_bwd_cpu(
    const at::Tensor& dout_, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& lse_, const at::Tensor& segments, double scale, int64_t window, const std::string& kernels) {
  Attention attention(query, key, value, segments, scale, window, kernels);
  TORCH_CHECK_VALUE(dout_.sizes() == query.sizes() && dout_.scalar_type() == query.scalar_type(),
                    "dout must be of the shape and dtype of query");
  const at::Tensor dout = Attention::with_elements_side_by_side(dout_), lse = lse_.contiguous();
  at::Tensor dquery = at::empty(query.sizes(), query.options());
  attention.problem.dout = view_of(dout);
  attention.problem.dquery = view_of(dquery);
  attention.problem.lse = const_cast<float*>(lse.const_data_ptr<float>());
  KeySums dkey(attention), dvalue(attention);
  attention.for_each(true, [&](int64_t segment, int64_t group, char* scratch) {
    attention.kernels->attention_backward(attention.problem, attention.segments.list[segment], group,
                                          dkey.of(segment, group), dvalue.of(segment, group), scratch);
  });
  return {dquery, dkey.total(attention, key), dvalue.total(attention, value)};
}

}  // namespace flow_kernels
