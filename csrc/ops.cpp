// Registration of the compiled CPU operators; flow_kernels/cpu.py calls them behind the public schemas of ops.py.
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/operators.h"

#define OPTIONS "Tensor? class_weight, int ignore_index, float label_smoothing, float softcap, float z_loss"
#define NEEDS "bool need_dinput, bool need_dlinear_weight, bool need_dlinear_bias"
#define HEADS "Tensor query, Tensor key, Tensor value, Tensor segments, float scale, int window"
#define HEAD "Tensor input, Tensor linear_weight, Tensor target"

namespace {

std::vector<std::string> kernel_names(at::ScalarType dtype) {
  return flow_kernels::kernel_names(flow_kernels::dtype_of(dtype, "dtype"));
}

}  // namespace

TORCH_LIBRARY(flow_kernels_cpu, m) {
  m.def("kernel_names(ScalarType dtype) -> str[]", kernel_names);
  m.def("cross_entropy_fwd(Tensor logits, Tensor target, " OPTIONS ", str kernels) -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_score(Tensor logits, Tensor target, int ignore_index, float softcap, str kernels)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor lse, " OPTIONS ", str kernels) -> Tensor");
  m.def("cross_entropy_fwd_bwd(Tensor logits, Tensor target, Tensor row_weight, " OPTIONS ", str kernels) -> (Tensor, Tensor)");
  m.def("linear_cross_entropy_fwd(" HEAD ", Tensor? linear_bias, " OPTIONS ", str kernels)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("linear_cross_entropy_score(" HEAD ", Tensor? linear_bias, int ignore_index, float softcap, str kernels)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("linear_cross_entropy_bwd(Tensor dloss, " HEAD ", Tensor lse, Tensor? linear_bias, " OPTIONS
        ", float grad_filter_eps, " NEEDS ", str kernels) -> (Tensor, Tensor, Tensor)");
  m.def("linear_cross_entropy_fwd_bwd(" HEAD ", Tensor row_weight, Tensor? linear_bias, " OPTIONS
        ", int chunk_size, float grad_filter_eps, " NEEDS ", str kernels) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("packed_attention_fwd(" HEADS ", str kernels) -> (Tensor, Tensor)");
  m.def("packed_attention_bwd(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor segments, float scale,"
        " int window, str kernels) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(flow_kernels_cpu, CPU, m) {
  m.impl("cross_entropy_fwd", flow_kernels::cross_entropy_fwd_cpu);
  m.impl("cross_entropy_score", flow_kernels::cross_entropy_score_cpu);
  m.impl("cross_entropy_bwd", flow_kernels::cross_entropy_bwd_cpu);
  m.impl("cross_entropy_fwd_bwd", flow_kernels::cross_entropy_fwd_bwd_cpu);
  m.impl("linear_cross_entropy_fwd", flow_kernels::linear_cross_entropy_fwd_cpu);
  m.impl("linear_cross_entropy_score", flow_kernels::linear_cross_entropy_score_cpu);
  m.impl("linear_cross_entropy_bwd", flow_kernels::linear_cross_entropy_bwd_cpu);
  m.impl("linear_cross_entropy_fwd_bwd", flow_kernels::linear_cross_entropy_fwd_bwd_cpu);
  m.impl("packed_attention_fwd", flow_kernels::packed_attention_fwd_cpu);
  m.impl("packed_attention_bwd", flow_kernels::packed_attention_bwd_cpu);
}
