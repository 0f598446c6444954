// avx512_bf16: every function below is compiled for this instruction set and called only on CPUs that have it.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define FLOW_ISA isa_avx512_bf16
#define FLOW_HAS_BF16
#include "vec_avx512.h"

#include "rows.h"

#include "gemm.h"

#include "grad_filter.h"

#include "tiles.h"

#include "attention.h"

#include "table.h"

namespace flow_kernels {

static bool runs() {
  return avx512_kernels() != nullptr && __builtin_cpu_supports("avx512bf16");
}

const Kernels* avx512_bf16_kernels() {
  static constexpr Kernels kernels = FLOW_ISA::table<FLOW_ISA::Pairs>("avx512_bf16");
  return runs() ? &kernels : nullptr;
}

const Kernels* brgemm_kernels(BrgemmFn product) {
  static constexpr Kernels kernels = FLOW_ISA::table<FLOW_ISA::MatrixUnit>("brgemm");
  FLOW_ISA::brgemm_product = product;
  return runs() ? &kernels : nullptr;
}

}  // namespace flow_kernels
