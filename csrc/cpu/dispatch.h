// From tensors to the kernels of this CPU: the choice of an instruction set, and what both operators check and share.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <string>
#include <vector>

#include "api.h"

namespace flow_kernels {

DType dtype_of(at::ScalarType dtype, const char* name);

// The kernels for products of `dtype`: the best this CPU has, or those named (tests run all of them). Null if there are
// none, or the named ones do not exist here for this dtype.
const Kernels* kernels_for(DType dtype, const std::string& name);

// A thread that used AMX tiles gives them back, also when what it did throws.
struct Release {
  explicit Release(const Kernels& kernels) : is_needed(std::string(kernels.name) == "brgemm") {}
  ~Release();
  const bool is_needed;
};

// Names that kernels_for accepts on this CPU for `dtype`, best first.
std::vector<std::string> kernel_names(DType dtype);

// Rows that count, with everything about them in their order.
struct KeptRows {
  at::Tensor index, target, scale;  // int64, int64, fp32 (empty if none was given)
  int64_t size() const { return index.numel(); }
};

// Check every target, then keep the rows that have one and whose `scale` (if given) is not 0.
KeptRows keep_rows(const at::Tensor& target, const std::optional<at::Tensor>& scale, int64_t num_classes,
                   int64_t ignore_index);

// Ask for 2 MiB pages for a large fresh tensor: touching it first costs 0.35 s per 335 MB in 4 KiB pages on a virtual
// machine, five times as long as writing it.
at::Tensor with_huge_pages(at::Tensor tensor);

LossOptions loss_options(const std::optional<at::Tensor>& class_weight, int64_t num_classes, double label_smoothing,
                         double softcap, double z_loss);

// Row results from complete statistics of the classes other than the target. log_p is that of the target, exact to
// fp32's relative precision also near 0.
struct RowLoss {
  double lse;
  float loss, log_p, entropy;  // the entropy with need_entropy only
  bool correct;
};
RowLoss finish_row(const LossOptions& options, const RowTotals& row, int64_t target);

}  // namespace flow_kernels
