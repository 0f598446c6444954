// avx2: every function below is compiled for this instruction set and called only on CPUs that have it.
#pragma GCC target("avx2,fma,f16c")
#define FLOW_ISA isa_avx2
#include "vec_avx2.h"

#include "rows.h"

#include "gemm.h"

#include "grad_filter.h"

#include "tiles.h"

#include "attention.h"

#include "table.h"

namespace flow_kernels {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = FLOW_ISA::table<FLOW_ISA::Singles>("avx2");
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs ? &kernels : nullptr;
}

}  // namespace flow_kernels
