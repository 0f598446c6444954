// cross_entropy of given logits [N, V]: rows are independent, each is read once per pass and stays in cache between.
#include "operators.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"

namespace flow_kernels {

namespace {

const Kernels& row_kernels(const std::string& name) {
  const Kernels* kernels = kernels_for(DType::f32, name);
  TORCH_CHECK(kernels != nullptr, "this CPU has no kernels ", name.empty() ? "of AVX2 or better" : name);
  return *kernels;
}

struct Logits {
  at::Tensor tensor;
  DType dtype;
  const char* base;
  int64_t stride_bytes;

  explicit Logits(const at::Tensor& logits) {
    TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape [N, V]");
    dtype = dtype_of(logits.scalar_type(), "logits");
    tensor = logits.size(1) > 1 && logits.stride(1) != 1 ? logits.contiguous() : logits;
    base = static_cast<const char*>(tensor.const_data_ptr());
    stride_bytes = tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
  }
  const void* row(int64_t i) const { return base + i * stride_bytes; }
};

void check_rows(const at::Tensor& logits, const at::Tensor& rows, const char* name) {
  TORCH_CHECK_VALUE(rows.dim() == 1 && rows.numel() == logits.size(0), name, " must have shape [", logits.size(0),
                    "], one per row of logits, got ", rows.sizes());
}

RowLoss loss_of_row(const Kernels& kernels, const Logits& logits, int64_t row, int64_t target,
                    const LossOptions& options) {
  return finish_row(options, kernels.row_totals(logits.row(row), logits.dtype, target, options), target);
}

// Calls write(i, loss) for every kept row i of `rows`.
template <class Write>
void score_rows(const Logits& logits, const KeptRows& rows, const LossOptions& options, const std::string& kernels_name,
                const Write& write) {
  const Kernels& kernels = row_kernels(kernels_name);
  const int64_t* index = rows.index.const_data_ptr<int64_t>();
  const int64_t* targets = rows.target.const_data_ptr<int64_t>();
  at::parallel_for(0, rows.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      write(index[i], loss_of_row(kernels, logits, index[i], targets[i], options));
    }
  });
}

// dlogits [N, V]: zero where a row is left out, not yet written where one is kept. Forward and gradient of 512 bf16 rows
// of 152064 classes, half of them ignored, took 25 to 29 ms so, and 58 ms with at::zeros (2 cores, medians of 7 in turn).
at::Tensor empty_gradient(const at::Tensor& logits, const KeptRows& rows) {
  at::Tensor dlogits = with_huge_pages(at::empty(logits.sizes(), logits.options()));
  if (rows.size() == logits.size(0)) return dlogits;
  const int64_t* index = rows.index.const_data_ptr<int64_t>();  // ascending
  const int64_t row_bytes = logits.size(1) * static_cast<int64_t>(dlogits.element_size());
  char* out = static_cast<char*>(dlogits.mutable_data_ptr());
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!std::binary_search(index, index + rows.size(), row)) std::memset(out + row * row_bytes, 0, row_bytes);
    }
  });
  return dlogits;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_fwd_cpu(
    const at::Tensor& logits_, const at::Tensor& target, const std::optional<at::Tensor>& class_weight,
    int64_t ignore_index, double label_smoothing, double softcap, double z_loss, const std::string& kernels_name) {
  const Logits logits(logits_);
  const int64_t num_classes = logits_.size(1);
  check_rows(logits_, target, "target");
  const KeptRows rows = keep_rows(target, std::nullopt, num_classes, ignore_index);
  const LossOptions options = loss_options(class_weight, num_classes, label_smoothing, softcap, z_loss);
  at::Tensor loss = at::zeros({logits_.size(0)}, at::kFloat), lse = at::zeros({logits_.size(0)}, at::kDouble);
  at::Tensor correct = at::zeros({logits_.size(0)}, at::kBool);
  float* loss_ptr = loss.mutable_data_ptr<float>();
  double* lse_ptr = lse.mutable_data_ptr<double>();
  bool* correct_ptr = correct.mutable_data_ptr<bool>();
  score_rows(logits, rows, options, kernels_name, [&](int64_t i, const RowLoss& row) {
    loss_ptr[i] = row.loss;
    lse_ptr[i] = row.lse;
    correct_ptr[i] = row.correct;
  });
  return {loss, lse, correct};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_score_cpu(
    const at::Tensor& logits_, const at::Tensor& target, int64_t ignore_index, double softcap,
    const std::string& kernels_name) {
  const Logits logits(logits_);
  check_rows(logits_, target, "target");
  const KeptRows rows = keep_rows(target, std::nullopt, logits_.size(1), ignore_index);
  LossOptions options = loss_options(std::nullopt, logits_.size(1), 0.0, softcap, 0.0);
  options.need_entropy = true;
  at::Tensor loss = at::zeros({logits_.size(0)}, at::kFloat), entropy = at::zeros_like(loss);
  at::Tensor correct = at::zeros({logits_.size(0)}, at::kBool);
  float *loss_ptr = loss.mutable_data_ptr<float>(), *entropy_ptr = entropy.mutable_data_ptr<float>();
  bool* correct_ptr = correct.mutable_data_ptr<bool>();
  score_rows(logits, rows, options, kernels_name, [&](int64_t i, const RowLoss& row) {
    loss_ptr[i] = row.loss;
    entropy_ptr[i] = row.entropy;
    correct_ptr[i] = row.correct;
  });
  return {loss, correct, entropy};
}

at::Tensor cross_entropy_bwd_cpu(const at::Tensor& dloss, const at::Tensor& logits_, const at::Tensor& target,
                                 const at::Tensor& lse, const std::optional<at::Tensor>& class_weight,
                                 int64_t ignore_index, double label_smoothing, double softcap, double z_loss,
                                 const std::string& kernels_name) {
  const Logits logits(logits_);
  const int64_t num_classes = logits_.size(1);
  check_rows(logits_, target, "target");
  check_rows(logits_, lse, "lse");
  const KeptRows rows = keep_rows(target, dloss, num_classes, ignore_index);
  const LossOptions options = loss_options(class_weight, num_classes, label_smoothing, softcap, z_loss);
  at::Tensor dlogits = empty_gradient(logits_, rows);
  const Kernels& kernels = row_kernels(kernels_name);
  const at::Tensor lses = lse.to(at::kDouble).contiguous();
  const double* lse_ptr = lses.const_data_ptr<double>();
  const int64_t* index = rows.index.const_data_ptr<int64_t>();
  const int64_t* targets = rows.target.const_data_ptr<int64_t>();
  const float* scale = rows.scale.const_data_ptr<float>();
  char* out = static_cast<char*>(dlogits.mutable_data_ptr());
  const int64_t row_bytes = num_classes * static_cast<int64_t>(dlogits.element_size());
  at::parallel_for(0, rows.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.row_gradient(logits.row(index[i]), logits.dtype, targets[i], options, lse_ptr[index[i]], nullptr,
                           scale[i], out + index[i] * row_bytes);
    }
  });
  return dlogits;
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_fwd_bwd_cpu(
    const at::Tensor& logits_, const at::Tensor& target, const at::Tensor& row_weight,
    const std::optional<at::Tensor>& class_weight, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, const std::string& kernels_name) {
  const Logits logits(logits_);
  const int64_t num_classes = logits_.size(1);
  check_rows(logits_, target, "target");
  const KeptRows rows = keep_rows(target, row_weight, num_classes, ignore_index);
  const LossOptions options = loss_options(class_weight, num_classes, label_smoothing, softcap, z_loss);
  at::Tensor loss = at::zeros({logits_.size(0)}, at::kFloat);
  at::Tensor dlogits = empty_gradient(logits_, rows);
  const Kernels& kernels = row_kernels(kernels_name);
  const int64_t* index = rows.index.const_data_ptr<int64_t>();
  const int64_t* targets = rows.target.const_data_ptr<int64_t>();
  const float* scale = rows.scale.const_data_ptr<float>();
  float* loss_ptr = loss.mutable_data_ptr<float>();
  char* out = static_cast<char*>(dlogits.mutable_data_ptr());
  const int64_t row_bytes = num_classes * static_cast<int64_t>(dlogits.element_size());
  at::parallel_for(0, rows.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowLoss row = loss_of_row(kernels, logits, index[i], targets[i], options);
      loss_ptr[index[i]] = row.loss;
      kernels.row_gradient(logits.row(index[i]), logits.dtype, targets[i], options, row.lse, &row.log_p, scale[i],
                           out + index[i] * row_bytes);
    }
  });
  return {loss, dlogits};
}

}  // namespace flow_kernels
