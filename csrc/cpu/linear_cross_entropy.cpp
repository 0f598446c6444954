// cross_entropy of a linear head: what is shared by the threads is made here, the tiles are walked by the kernels.
//
// Forward: the vocabulary is cut into stretches, the same whatever the number of threads, and the stretches' row
// statistics are merged in order (stretches.h); so losses are bit-equal for any number of threads.
// Backward: every thread owns a range of tiles, so dweight needs no reduction and is bit-equal too; dinput is the sum of
// one fp32 buffer per thread, so it differs between thread counts by the rounding of that sum (relative 1e-6).
#include "operators.h"

#include "dispatch.h"
#include "stretches.h"

#include <array>
#include <atomic>
#include <cmath>
#include <utility>

namespace flow_kernels {

namespace {

// Stretches of the vocabulary that the forward pass hands to threads.
constexpr int64_t max_stretches = 64;

// Rows that are scored at a time, so that the memory of scoring does not grow with them: the head is packed again for each
// block, and the block's rows stay in cache. Of the time with all rows in one block, 1024 and 2048 at a time took 0.93 and
// 0.91 (8192 rows, D = 640, V = 65536) and 0.92 and 1.09 (4096 rows, D = 4096; bf16, pairs in turn on 2 noisy cores with
// AMX).
constexpr int64_t scored_rows = 1024;

// Bytes of exponentials (or logits) a training pass keeps beside those in dweight's own memory: a tile that fits saves one
// of four products. At most 256 MiB are to be used at N = 1024, where Gemma 3's head keeps 192, and not a tenth more at
// N = 8192; 3 to 4 MiB a thread go to tiles. Not what the threads leave of a budget: which tiles are kept must not depend
// on their number. A caller who has more memory says so with chunk_size, in rows of logits. bf16 keeps 2 bytes each, or 1
// where that makes more of them fit.
constexpr int64_t kept_budget = int64_t{204} << 20;
// A multiple of the rows whose logits are made at a time.
constexpr int64_t row_alignment = 64;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

at::Tensor bytes(int64_t size) { return with_huge_pages(at::empty({std::max<int64_t>(size, 64)}, at::kByte)); }

// Room that the next block of rows uses again: freed and asked for again, it would be new memory each time (an aligned
// block does not fit where the like of it was).
void make_room(at::Tensor& room, int64_t size) {
  if (room.defined() && room.numel() >= size) return;
  room.reset();
  room = bytes(size);
}

struct Head {
  at::Tensor input, weight, bias;
  KeptRows rows;
  const Kernels* kernels;
  HeadProblem problem{};
  at::Tensor rows_a, rows_b, scratch, target_logit, max_before, lse, log_p;
  int64_t first_row = 0;  // of those worked on, among the rows that count
  int threads;

  Head(const at::Tensor& input_, const at::Tensor& weight_, const at::Tensor& target, const OptionalTensor& bias_,
       const OptionalTensor& scale, const OptionalTensor& class_weight, int64_t ignore_index, double label_smoothing,
       double softcap, double z_loss, const std::string& kernels_name) {
    TORCH_CHECK_VALUE(input_.dim() == 2 && weight_.dim() == 2 && input_.size(1) == weight_.size(1),
                      "input [N, D] and linear_weight [V, D] do not fit: ", input_.sizes(), " and ", weight_.sizes());
    TORCH_CHECK_TYPE(input_.scalar_type() == weight_.scalar_type() || weight_.scalar_type() == at::kFloat,
                     "linear_weight is ", weight_.scalar_type(), " but input is ", input_.scalar_type());
    TORCH_CHECK_VALUE(target.dim() == 1 && target.numel() == input_.size(0), "one target per row is needed");
    const DType dtype = dtype_of(input_.scalar_type(), "input");
    kernels = kernels_for(dtype, kernels_name);
    TORCH_CHECK(kernels != nullptr, "this CPU has no ", kernels_name.empty() ? "AVX2" : kernels_name, " kernels for ",
                input_.scalar_type());
    threads = at::get_num_threads();
    const auto rows_contiguous = [](const at::Tensor& t) {
      return t.size(1) > 1 && t.stride(1) != 1 ? t.contiguous() : t;
    };
    input = rows_contiguous(input_);
    weight = rows_contiguous(weight_);
    rows = keep_rows(target, scale, weight.size(0), ignore_index);
    problem.num_rows = rows.size();
    problem.num_classes = weight.size(0);
    problem.dim = input.size(1);
    problem.dtype = dtype;
    problem.weight_dtype = dtype_of(weight.scalar_type(), "linear_weight");
    problem.weight = weight.const_data_ptr();
    problem.weight_stride = weight.stride(0);
    if (bias_.has_value()) {
      TORCH_CHECK_VALUE(bias_->dim() == 1 && bias_->numel() == problem.num_classes, "linear_bias must be [V]");
      bias = bias_->to(at::kFloat).contiguous();
      problem.bias = bias.const_data_ptr<float>();
    }
    problem.tile = kernels->tile_width(problem.dim);
    problem.num_tiles = (problem.num_classes + problem.tile - 1) / problem.tile;
    problem.loss = loss_options(class_weight, problem.num_classes, label_smoothing, softcap, z_loss);
    work_on(0, rows.size());
  }

  // Work on the rows [first, last) of those that count.
  void work_on(int64_t first, int64_t last) {
    first_row = first;
    problem.num_rows = last - first;
    problem.rows.lse = nullptr;  // another block's, as log_p is
    problem.rows.log_p = nullptr;
    problem.rows.target = rows.target.const_data_ptr<int64_t>() + first;
    if (rows.scale.numel() > 0) problem.rows.row_scale = rows.scale.const_data_ptr<float>() + first;
  }

  int64_t words() const { return (problem.dim + kernels->group - 1) / kernels->group; }
  int64_t padded_rows() const { return round_up(problem.num_rows, kernels->row_multiple); }
  int64_t columns() const { return round_up(problem.dim, kernels->width); }
  const int64_t* index() const { return rows.index.const_data_ptr<int64_t>() + first_row; }

  void pack_a() {
    make_room(rows_a, 4 * padded_rows() * words());
    problem.rows_a = static_cast<const uint32_t*>(rows_a.const_data_ptr());
    kernels->pack_rows_a(input.const_data_ptr(), input.stride(0), index(), problem.num_rows, problem.dim,
                         problem.dtype, problem.weight_dtype, static_cast<uint32_t*>(rows_a.mutable_data_ptr()));
  }

  void pack_b() {
    rows_b = bytes(4 * padded_rows() / kernels->group * columns());
    problem.rows_b = static_cast<const uint32_t*>(rows_b.const_data_ptr());
    kernels->pack_rows_b(input.const_data_ptr(), input.stride(0), index(), problem.num_rows, problem.dim,
                         problem.dtype, static_cast<uint32_t*>(rows_b.mutable_data_ptr()));
  }

  // Losses, lse and correctness into the rows' places; leaves target_logit, lse and log_p of the rows worked on.
  void forward(at::Tensor& loss_out, at::Tensor* lse_out, at::Tensor* correct_out, at::Tensor* entropy_out) {
    const int64_t n = problem.num_rows;
    if (n == 0) return;
    for (at::Tensor* t : {&target_logit, &max_before, &log_p}) *t = at::empty({n}, at::kFloat);
    lse = at::empty({n}, at::kDouble);
    problem.rows.target_logit = target_logit.mutable_data_ptr<float>();
    problem.rows.max_before = max_before.mutable_data_ptr<float>();
    Stretches stretches(problem, std::min(max_stretches, problem.num_tiles));
    const int64_t per_thread = kernels->scratch_bytes(problem, false);
    make_room(scratch, threads * per_thread);
    char* scratch_ptr = static_cast<char*>(scratch.mutable_data_ptr());
    // Threads take the next stretch when they are free: a core that is busy elsewhere delays one stretch, not half.
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const Release release(*kernels);
      for (int64_t w = begin; w < end; ++w) {
        for (int64_t s = next++; s < stretches.size(); s = next++) {
          Stretches::Stats stats = stretches.room();
          kernels->forward(problem, stretches.first_tile(s), stretches.first_tile(s + 1), stats.get(),
                           scratch_ptr + w * per_thread);
          stretches.add(s, std::move(stats));
        }
      }
    });
    float *loss_ptr = loss_out.mutable_data_ptr<float>(), *log_p_ptr = log_p.mutable_data_ptr<float>();
    double* lse_ptr = lse.mutable_data_ptr<double>();
    for (int64_t i = 0; i < n; ++i) {
      const RowLoss row = finish_row(problem.loss, stretches.total(i), problem.rows.target[i]);
      lse_ptr[i] = row.lse;
      log_p_ptr[i] = row.log_p;
      loss_ptr[index()[i]] = row.loss;
      if (lse_out != nullptr) lse_out->mutable_data_ptr<double>()[index()[i]] = row.lse;
      if (entropy_out != nullptr) entropy_out->mutable_data_ptr<float>()[index()[i]] = row.entropy;
      if (correct_out != nullptr) correct_out->mutable_data_ptr<bool>()[index()[i]] = row.correct;
    }
    problem.rows.lse = lse_ptr;
    problem.rows.log_p = log_p_ptr;
  }

  // The same for forward-only calls, a block of rows at a time.
  void score(at::Tensor& loss_out, at::Tensor* lse_out, at::Tensor* correct_out, at::Tensor* entropy_out) {
    const int64_t n = rows.size(), blocks = (n + scored_rows - 1) / scored_rows;
    for (int64_t block = 0; block < blocks; ++block) {
      work_on(block * n / blocks, (block + 1) * n / blocks);
      pack_a();
      forward(loss_out, lse_out, correct_out, entropy_out);
    }
  }

  // Room for exponentials, or with a soft-cap for logits, that the backward pass need not make again; call before
  // `forward`, after `gradients`.
  std::array<at::Tensor, 3> keep_exponentials(int64_t chunk_size) {
    Kept& kept = problem.kept;
    const int64_t n = problem.num_rows, row_elements = problem.num_tiles * problem.tile;
    const auto budget = [&] { return chunk_size > 0 ? std::min(chunk_size, n) * row_elements * kept.bytes : kept_budget; };
    const auto in_dweight = [&] {
      const int64_t fit = problem.dweight == nullptr ? 0 : problem.dim * bytes_of(problem.weight_dtype) / kept.bytes;
      return fit >= n ? n : fit / row_alignment * row_alignment;
    };
    const auto left = [&] { return (n - kept.in_dweight) * row_elements * kept.bytes; };
    kept.logits = problem.loss.softcap > 0;
    kept.bytes = problem.dtype == DType::bf16 && !kept.logits ? 2 : 4;
    kept.in_dweight = 0;
    const bool keep = n > 0;
    if (keep && left() > budget()) kept.in_dweight = in_dweight();
    if (keep && left() > budget() && kept.bytes == 2 && chunk_size == 0) {
      kept.bytes = 1;
      kept.in_dweight = in_dweight();
    }
    const int64_t rest = n - kept.in_dweight;
    kept.num_kept = !keep || rest == 0 ? 0 : std::min(budget() / (rest * problem.tile * kept.bytes), problem.num_tiles);
    at::Tensor values = bytes(kept.num_kept * rest * problem.tile * kept.bytes);
    at::Tensor maxima = at::empty({kept.num_kept * rest}, at::kFloat);
    at::Tensor dweight_maxima = at::empty({problem.num_tiles * kept.in_dweight}, at::kFloat);
    kept.values = static_cast<char*>(values.mutable_data_ptr());
    kept.maxima = maxima.mutable_data_ptr<float>();
    kept.dweight_maxima = dweight_maxima.mutable_data_ptr<float>();
    return {values, maxima, dweight_maxima};
  }

  // Where the gradients go; zero where no row counts.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(bool need_dinput, bool need_dweight, bool need_dbias) {
    const bool some = problem.num_rows > 0;
    at::Tensor dinput = need_dinput ? at::zeros(input.sizes(), input.options()) : at::empty({0}, input.options());
    const auto options = weight.options();
    at::Tensor dweight = !need_dweight ? at::empty({0}, options)
                         : some        ? with_huge_pages(at::empty(weight.sizes(), options))
                                       : at::zeros(weight.sizes(), options);
    at::Tensor dbias = at::zeros({need_dbias ? problem.num_classes : 0}, at::kFloat);
    problem.need_dinput = need_dinput;
    problem.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
    problem.dbias = need_dbias ? dbias.mutable_data_ptr<float>() : nullptr;
    return {dinput, dweight, dbias};
  }

  void backward(at::Tensor& dinput) {
    if (problem.num_rows == 0 || (!problem.need_dinput && problem.dweight == nullptr && problem.dbias == nullptr)) {
      return;
    }
    const int64_t workers = std::min<int64_t>(threads, problem.num_tiles);
    const int64_t part = problem.need_dinput ? padded_rows() * columns() : 0;
    const int64_t per_thread = kernels->scratch_bytes(problem, true);
    at::Tensor parts = at::empty({workers * part}, at::kFloat);
    make_room(scratch, workers * per_thread);
    float* parts_ptr = parts.mutable_data_ptr<float>();
    char* scratch_ptr = static_cast<char*>(scratch.mutable_data_ptr());
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      const Release release(*kernels);
      for (int64_t w = begin; w < end; ++w) {
        kernels->backward(problem, w * problem.num_tiles / workers, (w + 1) * problem.num_tiles / workers,
                          parts_ptr + w * part, scratch_ptr + w * per_thread);
      }
    });
    if (!problem.need_dinput) return;
    at::parallel_for(0, problem.num_rows, 16, [&](int64_t begin, int64_t end) {
      kernels->finish_dinput(parts_ptr, workers, part, problem.dim, index(), begin, end, problem.dtype,
                             dinput.mutable_data_ptr(), dinput.stride(0));
    });
  }
};

at::ScalarType bias_dtype(const at::Tensor& input, const OptionalTensor& bias) {
  return bias.has_value() ? bias->scalar_type() : input.scalar_type();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_fwd_cpu(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
    const OptionalTensor& linear_bias, const OptionalTensor& class_weight, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, const std::string& kernels) {
  Head head(input, linear_weight, target, linear_bias, std::nullopt, class_weight, ignore_index, label_smoothing,
            softcap, z_loss, kernels);
  at::Tensor loss = at::zeros({input.size(0)}, at::kFloat), lse = at::zeros({input.size(0)}, at::kDouble);
  at::Tensor correct = at::zeros({input.size(0)}, at::kBool);
  head.score(loss, &lse, &correct, nullptr);
  return {loss, lse, correct};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_score_cpu(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
    const OptionalTensor& linear_bias, int64_t ignore_index, double softcap, const std::string& kernels) {
  Head head(input, linear_weight, target, linear_bias, std::nullopt, std::nullopt, ignore_index, 0.0, softcap, 0.0,
            kernels);
  head.problem.loss.need_entropy = true;
  at::Tensor loss = at::zeros({input.size(0)}, at::kFloat), entropy = at::zeros_like(loss);
  at::Tensor correct = at::zeros({input.size(0)}, at::kBool);
  head.score(loss, nullptr, &correct, &entropy);
  return {loss, correct, entropy};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_bwd_cpu(
    const at::Tensor& dloss, const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
    const at::Tensor& lse, const OptionalTensor& linear_bias, const OptionalTensor& class_weight, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, double grad_filter_eps, bool need_dinput,
    bool need_dlinear_weight, bool need_dlinear_bias, const std::string& kernels) {
  Head head(input, linear_weight, target, linear_bias, dloss, class_weight, ignore_index, label_smoothing, softcap,
            z_loss, kernels);
  head.problem.grad_filter_eps = static_cast<float>(grad_filter_eps);
  auto [dinput, dweight, dbias] = head.gradients(need_dinput, need_dlinear_weight, need_dlinear_bias);
  head.lse = lse.to(at::kDouble).index_select(0, head.rows.index);
  head.problem.rows.lse = head.lse.const_data_ptr<double>();
  head.pack_a();
  if (need_dlinear_weight) head.pack_b();
  head.backward(dinput);
  return {dinput, dweight, dbias.to(bias_dtype(input, linear_bias))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_fwd_bwd_cpu(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target, const at::Tensor& row_weight,
    const OptionalTensor& linear_bias, const OptionalTensor& class_weight, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, int64_t chunk_size, double grad_filter_eps, bool need_dinput,
    bool need_dlinear_weight, bool need_dlinear_bias, const std::string& kernels) {
  Head head(input, linear_weight, target, linear_bias, row_weight, class_weight, ignore_index, label_smoothing, softcap,
            z_loss, kernels);
  at::Tensor loss = at::zeros({input.size(0)}, at::kFloat);
  head.problem.grad_filter_eps = static_cast<float>(grad_filter_eps);
  auto [dinput, dweight, dbias] = head.gradients(need_dinput, need_dlinear_weight, need_dlinear_bias);
  const auto exponentials = head.keep_exponentials(chunk_size);
  head.pack_a();
  if (need_dlinear_weight) head.pack_b();
  head.forward(loss, nullptr, nullptr, nullptr);
  head.backward(dinput);
  return {loss, dinput, dweight, dbias.to(bias_dtype(input, linear_bias))};
}

}  // namespace flow_kernels
