// The GPU primitives the kernels are written in. tests/cuda_host/host_cuda.h has the same names for the host, so the
// kernels' source compiles unchanged in both worlds; whatever moves global memory goes through a function of this file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace flow_kernels {

// 16 bytes, the widest access of one thread.
struct alignas(16) Unit {
  uint32_t word[4];
};

// exp2 within 2 ulp; results below 2^-126 are 0. The library's exp2f spends three more instructions on subnormals.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ Unit shared_units[];
  return reinterpret_cast<unsigned char*>(shared_units);
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& y) { y = __float2half_rn(x); }

// Through the words and not through an array of T: a T[8] on the stack would be local memory.
__device__ __forceinline__ void unpack(const Unit& unit, float (&z)[4], float) {
#pragma unroll
  for (int k = 0; k < 4; ++k) z[k] = __uint_as_float(unit.word[k]);
}
__device__ __forceinline__ void unpack(const Unit& unit, float (&z)[8], __nv_bfloat16) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    z[2 * k] = __uint_as_float(unit.word[k] << 16);
    z[2 * k + 1] = __uint_as_float(unit.word[k] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(const Unit& unit, float (&z)[8], __half) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&unit.word[k]));
    z[2 * k] = pair.x;
    z[2 * k + 1] = pair.y;
  }
}

__device__ __forceinline__ Unit pack(const float (&z)[4], float) {
  return {__float_as_uint(z[0]), __float_as_uint(z[1]), __float_as_uint(z[2]), __float_as_uint(z[3])};
}
__device__ __forceinline__ Unit pack(const float (&z)[8], __nv_bfloat16) {
  Unit unit;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(z[2 * k], z[2 * k + 1]);
    unit.word[k] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return unit;
}
__device__ __forceinline__ Unit pack(const float (&z)[8], __half) {
  Unit unit;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const __half2 pair = __floats2half2_rn(z[2 * k], z[2 * k + 1]);
    unit.word[k] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return unit;
}

// Loads through the read-only path: nobody writes what is read so, and the compiler may move them past stores.
__device__ __forceinline__ Unit load_unit(const void* from) {
  const uint4 x = __ldg(static_cast<const uint4*>(from));
  return {x.x, x.y, x.z, x.w};
}
template <class T>
__device__ __forceinline__ T load_global(const T* from) {
  return __ldg(from);
}
__device__ __forceinline__ int64_t load_global(const int64_t* from) {
  return __ldg(reinterpret_cast<const long long*>(from));
}
// Ordinary loads, of what the same thread may write next: the gradient in the place of a row that is read twice.
__device__ __forceinline__ Unit reload_unit(const void* from) {
  const uint4 x = *static_cast<const uint4*>(from);
  return {x.x, x.y, x.z, x.w};
}
template <class T>
__device__ __forceinline__ T reload(const T* from) {
  return *from;
}
// The same address in all lanes of a warp: one access for the warp.
template <class T>
__device__ __forceinline__ T load_uniform(const T* from) {
  return load_global(from);
}
__device__ __forceinline__ void store_unit(void* to, const Unit& unit) {
  *static_cast<uint4*>(to) = make_uint4(unit.word[0], unit.word[1], unit.word[2], unit.word[3]);
}
template <class T>
__device__ __forceinline__ void store_global(T* to, T value) {
  *to = value;
}

// cp.async.cg: L2 to shared memory without registers and without L1, where a logit would only displace others.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Thread-block clusters exist from sm_90 on; the launcher never asks for one below, where these compile to nothing.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The word at the address of `shared` in the shared memory of block `rank` of this cluster.
__device__ __forceinline__ float load_remote(const float* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  const uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t remote;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
  return value;
#else
  return *shared;
#endif
}

}  // namespace flow_kernels
