// csrc/cuda/cross_entropy.cuh for the host: a C interface that tests/test_cuda_kernels.py calls through ctypes.
#include "cross_entropy.cuh"

namespace {

using namespace flow_kernels;

template <class T>
CrossEntropyKernel kernel_of(bool is_forward, bool is_held, bool has_softcap, bool has_smoothing) {
  if (is_forward) return fwd_kernel<T>(has_softcap, has_smoothing);
  return is_held ? fwd_bwd_kernel<T, true>(has_softcap, has_smoothing)
                 : fwd_bwd_kernel<T, false>(has_softcap, has_smoothing);
}

}  // namespace

// How to run: element type 0 float32, 1 bfloat16, 2 float16, and the fields of Plan.
struct HostLaunch {
  int element_type, is_forward, is_held, num_threads, shared_bytes;
  int64_t num_rows;
  uint64_t seed;
};

extern "C" void flow_host_cross_entropy(const CrossEntropyArgs* args, const HostLaunch* how,
                                        host_cuda::Counters* counters) {
  const bool has_softcap = args->softcap > 0, has_smoothing = args->label_smoothing > 0;
#ifdef ONLY_BFLOAT16  // A third of the compilation, for tests that need no more.
  const auto choose = kernel_of<__nv_bfloat16>;
#else
  const auto choose = how->element_type == 0   ? kernel_of<float>
                      : how->element_type == 1 ? kernel_of<__nv_bfloat16>
                                               : kernel_of<__half>;
#endif
  *counters = host_cuda::launch(choose(how->is_forward, how->is_held, has_softcap, has_smoothing), *args,
                                how->num_rows * args->cluster_size, args->cluster_size, how->num_threads,
                                static_cast<size_t>(how->shared_bytes), how->seed);
}

extern "C" void flow_host_plan(int64_t num_classes, int element_bytes, const Device* device, int* plan) {
  const Plan found = plan_row(num_classes, element_bytes, *device);
  plan[0] = found.held;
  plan[1] = found.cluster_size;
  plan[2] = found.num_threads;
  plan[3] = found.shared_bytes;
}
