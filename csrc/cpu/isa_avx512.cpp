// avx512: every function below is compiled for this instruction set and called only on CPUs that have it.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FLOW_ISA isa_avx512
#include "vec_avx512.h"

#include "rows.h"

#include "gemm.h"

#include "grad_filter.h"

#include "tiles.h"

#include "attention.h"

#include "table.h"

namespace flow_kernels {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = FLOW_ISA::table<FLOW_ISA::Singles>("avx512");
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return runs ? &kernels : nullptr;
}

}  // namespace flow_kernels
