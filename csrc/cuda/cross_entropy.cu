// Launchers and registration of the CUDA cross_entropy; flow_kernels/cuda.py calls them behind the schemas of ops.py.
// Stable ABI only: the library serves every torch from 2.10 on, and links against a torch without CUDA.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <mutex>
#include <optional>
#include <tuple>

#include "cross_entropy.cuh"

namespace flow_kernels {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "flow_kernels cuda: ", what, ": ", cudaGetErrorString(error));
}

// The guard changes the device of torch's CUDA runtime and gives it back in the end; this library has a runtime of its
// own, linked statically, so that it depends on no version of libcudart.
class Guard {
 public:
  explicit Guard(int device) : guard_(device) { check(cudaSetDevice(device), "cudaSetDevice"); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

struct Config {
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t launch;

  Config(const Plan& plan, int64_t num_rows, cudaStream_t stream) : launch() {
    launch.gridDim = dim3(static_cast<unsigned>(num_rows * plan.cluster_size));
    launch.blockDim = dim3(plan.num_threads);
    launch.dynamicSmemBytes = plan.shared_bytes;
    launch.stream = stream;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = plan.cluster_size;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    launch.attrs = &cluster;
    launch.numAttrs = plan.cluster_size > 1 ? 1 : 0;
  }
  Config(const Config&) = delete;
};

// What a kernel may use belongs to the kernel and not to a launch: between `allow` and the launch it is for, no other
// thread may set it lower.
std::mutex& limits_mutex() {
  static std::mutex mutex;
  return mutex;
}

cudaError_t allow(CrossEntropyKernel kernel, const Plan& plan) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess || plan.cluster_size <= 8) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// A cluster needs its blocks' shared memory in one GPU processing cluster, some of which have fewer SMs than others, so
// the device is asked; a row it cannot hold is read twice.
Plan plan_for(int64_t num_classes, int element_bytes, int device, CrossEntropyKernel held_kernel) {
  Device limits{attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9 ? 16 : 1};
  for (;;) {
    const Plan plan = plan_row(num_classes, element_bytes, limits);
    if (plan.cluster_size == 1) return plan;
    int num_clusters = 0;
    const Config config(plan, 1, nullptr);
    const std::lock_guard<std::mutex> lock(limits_mutex());
    if (allow(held_kernel, plan) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&num_clusters, held_kernel, &config.launch) == cudaSuccess &&
        num_clusters > 0) {
      return plan;
    }
    cudaGetLastError();  // The refusal is an answer, not an error of a later call.
    limits.max_cluster_size = plan.cluster_size / 2;
  }
}

struct Kernels {
  CrossEntropyKernel held, streamed, forward;
  int element_bytes;
};

template <class T>
Kernels kernels_of(bool has_softcap, bool has_smoothing) {
  return {fwd_bwd_kernel<T, true>(has_softcap, has_smoothing), fwd_bwd_kernel<T, false>(has_softcap, has_smoothing),
          fwd_kernel<T>(has_softcap, has_smoothing), sizeof(T)};
}

Kernels kernels_for(ScalarType dtype, bool has_softcap, bool has_smoothing) {
  switch (dtype) {
    case ScalarType::Float:
      return kernels_of<float>(has_softcap, has_smoothing);
    case ScalarType::BFloat16:
      return kernels_of<__nv_bfloat16>(has_softcap, has_smoothing);
    case ScalarType::Half:
      return kernels_of<__half>(has_softcap, has_smoothing);
    default:
      STD_TORCH_CHECK(false, "flow_kernels cuda: logits must be float32, bfloat16 or float16");
  }
}

const void* vector_ptr(const Tensor& tensor, const Tensor& logits, int64_t size, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == logits.get_device_index(), name,
                  " is not on the device of logits");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.dim() == 1 && tensor.size(0) == size &&
                      tensor.is_contiguous(),
                  name, " must be contiguous, of ", size, " elements and ",
                  dtype == ScalarType::Long ? "int64" : "float32");
  return tensor.const_data_ptr();
}

struct Options {
  int64_t ignore_index;
  double label_smoothing, softcap, z_loss;
};

CrossEntropyArgs args_of(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
                         const Options& options) {
  const int64_t num_rows = logits.size(0), num_classes = logits.size(1);
  // Column arithmetic is int32 and looks one unit and one block of threads past the row. MAX_CLASSES of
  // flow_kernels/cuda.py is the last number allowed.
  STD_TORCH_CHECK(num_classes < std::numeric_limits<int>::max() - 64 - kMaxThreads, "logits have too many columns: ",
                  num_classes);
  STD_TORCH_CHECK(num_rows <= std::numeric_limits<int>::max() / 16, "logits have too many rows: ", num_rows);
  CrossEntropyArgs args{};
  args.logits = logits.const_data_ptr();
  args.target = static_cast<const int64_t*>(vector_ptr(target, logits, num_rows, ScalarType::Long, "target"));
  if (class_weight.has_value()) {
    args.class_weight =
        static_cast<const float*>(vector_ptr(*class_weight, logits, num_classes, ScalarType::Float, "class_weight"));
  }
  args.logits_row_stride = logits.stride(0);
  args.ignore_index = options.ignore_index;
  args.num_classes = static_cast<int>(num_classes);
  args.cluster_size = 1;
  args.label_smoothing = static_cast<float>(options.label_smoothing);
  args.softcap = static_cast<float>(options.softcap);
  args.z_loss = static_cast<float>(options.z_loss);
  return args;
}

// A view with unit column stride is read where it lies.
Tensor readable(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must have shape [N, V]");
  return logits.size(1) > 1 && logits.stride(1) != 1 ? torch::stable::contiguous(logits) : logits;
}

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** ret_stream);

// It is defined in libtorch_cuda, which a torch without CUDA lacks, so nothing here may link to it; and Python loads
// that library with local symbols, so a weak reference would stay null. Its handle knows the symbol in any case.
CurrentStream find_current_stream() {
  const char* name = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, name);
  if (found == nullptr) {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    found = library == nullptr ? nullptr : dlsym(library, name);
  }
  return reinterpret_cast<CurrentStream>(found);
}

cudaStream_t current_stream(int device) {
  static const CurrentStream get = find_current_stream();
  STD_TORCH_CHECK(get != nullptr, "flow_kernels cuda: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void launch(CrossEntropyKernel kernel, const Plan& plan, CrossEntropyArgs args, int64_t num_rows, int device) {
  args.cluster_size = plan.cluster_size;
  const Config config(plan, num_rows, current_stream(device));
  const std::lock_guard<std::mutex> lock(limits_mutex());
  check(allow(kernel, plan), "shared memory or cluster size of a block");
  check(cudaLaunchKernelEx(&config.launch, kernel, args), "launch of cross_entropy");
}

// Losses into `loss` and gradients into `dlogits`, which may be `logits`; both with unit column stride.
// `bad_gradient`: of a row whose target is outside [0, V).
void run_fwd_bwd(const Tensor& logits, const Tensor& target, const Tensor& row_weight,
                 const std::optional<Tensor>& class_weight, Tensor& loss, Tensor& dlogits, float bad_gradient,
                 const Options& options) {
  const int64_t num_rows = logits.size(0), num_classes = logits.size(1);
  if (num_rows == 0) return;
  CrossEntropyArgs args = args_of(logits, target, class_weight, options);
  args.row_weight =
      static_cast<const float*>(vector_ptr(row_weight, logits, num_rows, ScalarType::Float, "row_weight"));
  args.dlogits = dlogits.mutable_data_ptr();
  args.dlogits_row_stride = dlogits.stride(0);
  args.bad_gradient = bad_gradient;
  args.loss = static_cast<float*>(loss.mutable_data_ptr());
  const Kernels kernels = kernels_for(logits.scalar_type(), options.softcap > 0, options.label_smoothing > 0);
  const int device = logits.get_device_index();
  const Plan plan = plan_for(num_classes, kernels.element_bytes, device, kernels.held);
  launch(plan.held ? kernels.held : kernels.streamed, plan, args, num_rows, device);
}

}  // namespace

std::tuple<Tensor, Tensor> cross_entropy_fwd_bwd_cuda(const Tensor& logits_, const Tensor& target,
                                                      const Tensor& row_weight,
                                                      const std::optional<Tensor>& class_weight, int64_t ignore_index,
                                                      double label_smoothing, double softcap, double z_loss) {
  const Guard guard(logits_.get_device_index());
  const Tensor logits = readable(logits_);
  Tensor dlogits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  Tensor loss = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float);
  run_fwd_bwd(logits, target, row_weight, class_weight, loss, dlogits, std::numeric_limits<float>::quiet_NaN(),
              {ignore_index, label_smoothing, softcap, z_loss});
  return {loss, dlogits};
}

// The gradient in place of the logits, which no one else needs: those of a linear head. There the gradients of the rows are
// summed, so one bad target must not make NaN of them all.
void cross_entropy_fwd_bwd_in_place_cuda(Tensor logits, const Tensor& target, const Tensor& row_weight, Tensor loss,
                                         const std::optional<Tensor>& class_weight, int64_t ignore_index,
                                         double label_smoothing, double softcap, double z_loss) {
  const Guard guard(logits.get_device_index());
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) == 1 || logits.stride(1) == 1),
                  "logits must have shape [N, V] and unit column stride");
  vector_ptr(loss, logits, logits.size(0), ScalarType::Float, "loss");
  run_fwd_bwd(logits, target, row_weight, class_weight, loss, logits, 0.0f,
              {ignore_index, label_smoothing, softcap, z_loss});
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd_cuda(const Tensor& logits_, const Tensor& target,
                                                          const std::optional<Tensor>& class_weight,
                                                          int64_t ignore_index, double label_smoothing, double softcap,
                                                          double z_loss) {
  const Guard guard(logits_.get_device_index());
  const Tensor logits = readable(logits_);
  const int64_t num_rows = logits.size(0);
  Tensor loss = torch::stable::new_empty(logits, {num_rows}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {num_rows}, ScalarType::Double);
  Tensor correct = torch::stable::new_empty(logits, {num_rows}, ScalarType::Bool);
  if (num_rows == 0) return {loss, lse, correct};
  CrossEntropyArgs args = args_of(logits, target, class_weight, {ignore_index, label_smoothing, softcap, z_loss});
  args.loss = static_cast<float*>(loss.mutable_data_ptr());
  args.lse = static_cast<double*>(lse.mutable_data_ptr());
  args.correct = static_cast<bool*>(correct.mutable_data_ptr());
  const Kernels kernels = kernels_for(logits.scalar_type(), softcap > 0, label_smoothing > 0);
  // No shared memory for rows and no clusters: the plan is the one of rows that are not held.
  const Plan plan = plan_row(logits.size(1), kernels.element_bytes, Device{0, 0, 1});
  launch(kernels.forward, plan, args, num_rows, logits.get_device_index());
  return {loss, lse, correct};
}

// CUDA's error where the current device can run none of the kernels, as they were compiled for others; else 0.
int64_t load_error_cuda() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, fwd_kernel<float>(false, false));
  cudaGetLastError();  // It is the answer, not an error of a later call.
  return error;
}

}  // namespace flow_kernels

#define OPTIONS "Tensor? class_weight, int ignore_index, float label_smoothing, float softcap, float z_loss"

STABLE_TORCH_LIBRARY(flow_kernels_cuda, m) {
  m.def("cross_entropy_fwd(Tensor logits, Tensor target, " OPTIONS ") -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_fwd_bwd(Tensor logits, Tensor target, Tensor row_weight, " OPTIONS ") -> (Tensor, Tensor)");
  m.def("cross_entropy_fwd_bwd_in_place(Tensor(a!) logits, Tensor target, Tensor row_weight, Tensor(b!) loss, " OPTIONS
        ") -> ()");
  m.def("load_error() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flow_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("load_error", TORCH_BOX(&flow_kernels::load_error_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(flow_kernels_cuda, CUDA, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&flow_kernels::cross_entropy_fwd_cuda));
  m.impl("cross_entropy_fwd_bwd", TORCH_BOX(&flow_kernels::cross_entropy_fwd_bwd_cuda));
  m.impl("cross_entropy_fwd_bwd_in_place", TORCH_BOX(&flow_kernels::cross_entropy_fwd_bwd_in_place_cuda));
}
