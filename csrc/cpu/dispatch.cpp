#include "dispatch.h"

#include <ATen/Context.h>
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cmath>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

namespace flow_kernels {

namespace {

void bf16_brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const void* a,
                 const void* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, static_cast<const at::BFloat16*>(a),
                              static_cast<const at::BFloat16*>(b), c);
}

// An Intel core gives no more bf16 products by vdpbf16ps than fp32 ones by fma, and by what was measured only half as
// many: Xeon of family 6, model 207 (AMX hidden by its hypervisor), 2 cores, N=1024, D=640, V=65536: forward 0.52 s by
// avx512_bf16 and by brgemm, 0.28 s by avx512; with both gradients 1.9, 1.8 and 0.86 s. Zen 4 doubles the products. By
// vendor and not by a clock, so that a process does not differ from the next in the last bits.
bool has_slow_vdpbf16ps() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Whether oneDNN itself will take AMX: it may be kept from it (ONEDNN_MAX_CPU_ISA, no AVX512_FP16) where the CPU has it.
bool onednn_takes_amx() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  return at::native::cpublas::could_pack(at::kBFloat16);
#else
  return true;
#endif
}

// Best first. brgemm leads where the CPU has AMX; elsewhere its vdpbf16ps code only repeats ours, behind a table of
// generated kernels, and it stays for the tests.
std::vector<const Kernels*> candidates(DType dtype) {
  std::vector<const Kernels*> found;
  if (dtype == DType::bf16) {
    const Kernels* brgemm = at::globalContext().userEnabledMkldnn() ? brgemm_kernels(bf16_brgemm) : nullptr;
    static const bool has_amx = at::cpu::init_amx(), slow_vdpbf16ps = has_slow_vdpbf16ps();
    const bool amx = has_amx && onednn_takes_amx();
    if (amx) found.push_back(brgemm);
    if (slow_vdpbf16ps) found.push_back(avx512_kernels());
    found.push_back(avx512_bf16_kernels());
    if (!amx) found.push_back(brgemm);
    if (!slow_vdpbf16ps) found.push_back(avx512_kernels());
  } else {
    found.push_back(avx512_kernels());
  }
  found.push_back(avx2_kernels());
  std::vector<const Kernels*> present;
  for (const Kernels* kernels : found) {
    if (kernels != nullptr) present.push_back(kernels);
  }
  return present;
}

// log_sum - (sum of e (z - m)) / (sum of e) with e = exp(z - m) and m the largest of all logits, the target's included.
float entropy_of(const RowTotals& row, double margin, double log_sum) {
  double sum = row.sum, product = row.product;
  if (margin >= 0) {  // the target is m: its own e is 1, its z - m is 0
    const double factor = std::exp(-margin);
    if (sum != 0) product = (product - sum * margin) * factor;  // sum is 0 where m - max is infinite
    sum = sum * factor + 1;
  } else {
    const double e = std::exp(margin);
    if (e > 0) product += e * margin;
    sum += e;
  }
  const double entropy = log_sum - product / sum;
  return static_cast<float>(entropy < 0 ? 0 : entropy);  // by rounding only; NaN stays
}

}  // namespace

DType dtype_of(at::ScalarType dtype, const char* name) {
  switch (dtype) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_CHECK_TYPE(false, name, " is ", dtype, "; the cpu kernels take fp32, bf16 and fp16");
  }
}

const Kernels* kernels_for(DType dtype, const std::string& name) {
  for (const Kernels* kernels : candidates(dtype)) {
    if (name.empty() || name == kernels->name) return kernels;
  }
  return nullptr;
}

Release::~Release() {
  if (is_needed) at::native::cpublas::brgemm_release();
}

std::vector<std::string> kernel_names(DType dtype) {
  std::vector<std::string> names;
  for (const Kernels* kernels : candidates(dtype)) names.emplace_back(kernels->name);
  return names;
}

KeptRows keep_rows(const at::Tensor& target, const std::optional<at::Tensor>& scale, int64_t num_classes,
                   int64_t ignore_index) {
  TORCH_CHECK_VALUE(target.dim() == 1 && target.scalar_type() == at::kLong, "target must be int64 of shape [N]");
  const int64_t num_rows = target.numel();
  const at::Tensor targets = target.contiguous();
  const int64_t* t = targets.const_data_ptr<int64_t>();
  at::Tensor scales;
  const float* g = nullptr;
  if (scale.has_value()) {
    TORCH_CHECK_VALUE(scale->dim() == 1 && scale->numel() == num_rows, "one row weight per target is needed");
    scales = scale->to(at::kFloat).contiguous();
    g = scales.const_data_ptr<float>();
  }
  const auto counts = [&](int64_t i) { return t[i] != ignore_index && (g == nullptr || g[i] != 0); };
  int64_t kept = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    TORCH_CHECK_INDEX(t[i] == ignore_index || (t[i] >= 0 && t[i] < num_classes), "the target of row ", i, " is ", t[i],
                      ", outside [0, ", num_classes, ") and not ignore_index=", ignore_index);
    kept += counts(i);
  }
  KeptRows rows{at::empty({kept}, at::kLong), at::empty({kept}, at::kLong), at::empty({g == nullptr ? 0 : kept}, at::kFloat)};
  int64_t* index = rows.index.mutable_data_ptr<int64_t>();
  int64_t* target_of = rows.target.mutable_data_ptr<int64_t>();
  float* scale_of = rows.scale.mutable_data_ptr<float>();
  for (int64_t i = 0; i < num_rows; ++i) {
    if (!counts(i)) continue;
    *index++ = i;
    *target_of++ = t[i];
    if (g != nullptr) *scale_of++ = g[i];
  }
  return rows;
}

#ifdef __linux__
namespace {

constexpr uintptr_t huge_page = uintptr_t{2} << 20;

// Bytes of free memory that lie in blocks of a huge page and more; all there can be where Linux does not say. What the
// zones of small addresses have free is kept back, but on a machine that has no others.
uintptr_t free_huge_bytes() {
  std::ifstream file("/proc/buddyinfo");
  if (!file) return UINTPTR_MAX;
  uintptr_t total = 0, low = 0;
  bool has_more = false;
  for (std::string line; std::getline(file, line);) {
    // "Node 0, zone Normal 12 7 ...": the number of free blocks of 1, 2, 4 ... pages of 4 KiB.
    std::istringstream words(line);
    std::string word;
    for (int i = 0; i < 4; ++i) words >> word;
    const bool is_low = word.compare(0, 3, "DMA") == 0;
    has_more = has_more || !is_low;
    uintptr_t block = 4096;
    for (uintptr_t count; words >> count; block *= 2) (is_low ? low : total) += block >= huge_page ? block * count : 0;
  }
  return has_more ? total : low;
}

}  // namespace
#endif

at::Tensor with_huge_pages(at::Tensor tensor) {
#ifdef __linux__
  // Above 32 MiB malloc always maps memory for one block and unmaps it again, so the advice stays with this tensor.
  const auto size = static_cast<uintptr_t>(tensor.nbytes());
  if (size <= (uintptr_t{32} << 20)) return tensor;
  // Where others have left memory in small pieces, Linux would first put pieces together, each fault waiting for it.
  // Four times as much: what is there is not all for this process.
  if (free_huge_bytes() / 4 < size) return tensor;
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr()) + huge_page - 1) / huge_page * huge_page;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr()) + size) / huge_page * huge_page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

LossOptions loss_options(const std::optional<at::Tensor>& class_weight, int64_t num_classes, double label_smoothing,
                         double softcap, double z_loss) {
  LossOptions options{nullptr, 1.0f, static_cast<float>(label_smoothing), static_cast<float>(softcap),
                      static_cast<float>(z_loss), num_classes, false};
  if (class_weight.has_value()) {
    TORCH_CHECK_VALUE(class_weight->scalar_type() == at::kFloat && class_weight->is_contiguous() &&
                      class_weight->numel() == num_classes, "class_weight must be contiguous fp32 of shape [V]");
    options.class_weight = class_weight->const_data_ptr<float>();
    options.mean_class_weight = static_cast<float>(class_weight->sum(at::kDouble).item<double>() / num_classes);
  }
  return options;
}

RowLoss finish_row(const LossOptions& options, const RowTotals& row, int64_t target) {
  const double margin = static_cast<double>(row.target_logit) - row.max;
  const bool is_largest = row.target_logit >= row.max;
  // An infinite target_logit is NaN here as it is in the reference: no loss of 0, and no gradient of 0 for the others.
  const double log_sum = is_largest
                             ? std::log1p(row.sum * std::exp(-margin)) + (row.target_logit - row.target_logit)
                             : std::log(row.sum + std::exp(margin));
  const double lse = (is_largest ? row.target_logit : row.max) + log_sum;
  const double nll = is_largest ? log_sum : log_sum - margin;
  const double weight = options.class_weight == nullptr ? 1.0 : options.class_weight[target];
  double loss = (1.0 - options.label_smoothing) * weight * nll;
  if (options.label_smoothing > 0) {
    loss += options.label_smoothing * (lse * options.mean_class_weight - row.smooth / options.num_classes);
  }
  if (options.z_loss > 0) loss += options.z_loss * lse * lse;
  return {lse, static_cast<float>(loss), static_cast<float>(-nll),
          options.need_entropy ? entropy_of(row, margin, log_sum) : 0.0f,
          is_largest && !(row.max_before >= row.target_logit) && !std::isnan(nll)};
}

}  // namespace flow_kernels
