// cross_entropy of given logits [N, V]: row losses, and their gradients for row weights that are known beforehand.
//
// Formulas are those of flow_kernels/reference.py. With y the target, the statistics of a row are taken over the
// *other* logits, o = max_{j != y} z_j and s = sum_{j != y} exp(z_j - o), and the target joins at the end:
//
//     m = max(o, z_y),  S = s exp(o - m) + exp(z_y - m),  loss = (m - z_y) + log S,  dz_j = w exp(z_j - m) / S
//     dz_y = w (p_y - 1) = -w s exp(o - m) / S
//
// so neither log S = log1p(s) nor dz_y cancels where the target has p near 1, the rows that FLOW weights most.
//
// Bytes of global memory for a row of b-byte logits: V b read + V b written where the row is held (cluster of up to 16
// blocks of 227 KiB: V <= 1.8 M in bf16 on sm_90 and sm_100; one block: V <= 82,900 on sm_80), 2 V b + V b where it is
// not; 12 read and 4 written besides; class weights under label smoothing add 4 V read twice, from L2.
// The floor at V = 262144 in bf16, 4 V = 1 MiB a row, at the data sheets' bandwidth:
//
//     A100 80 GB 2.04 TB/s  0.77 us a row (two passes, 1.5 MiB)    H100 SXM 3.35 TB/s  0.31 us
//     H200       4.8  TB/s  0.22 us                                B200     8    TB/s  0.13 us
//
// Two exponentials a logit against 16 an SM and clock: H100 (132 SMs, 1.7 GHz) makes 3.6e12 a second and needs 1.7e12
// at the floor, B200 (148 SMs, 1.8 GHz) 4.3e12 and 4.0e12. So memory is the limit on A100, H100 and H200, and on B200
// both are; the soft-cap's two tanh a logit make arithmetic the limit everywhere. Those are figures on paper. Measured
// on an H100 whose copy moves 3.0 TB/s, the kernel alone in bf16, in per cent of the copy: 99 at V = 32768 (one
// block a row), 91 at 65536, 87 at 128256 and 262144 (clusters of 2, 4 and 8); a whole call with a soft-cap 36. A
// variant that held the row in registers, 16 units in each of 256 or 512 threads, reached 95, 94, 82 and 83.
#pragma once

#include "row.cuh"

namespace flow_kernels {

// Write columns [begin, end) of a row, 16 bytes at a time where `out` allows it; `make(column, z)` fills z with the
// values from `column` on.
template <class T, class Make>
__device__ __forceinline__ void write_columns(T* out, int begin, int end, const Make& make) {
  constexpr int kLanes = kUnitBytes / sizeof(T);
  const int past = (lanes_past_boundary(out) + begin) % kLanes;
  const int first = min(end, begin + (kLanes - past) % kLanes);
  const int num_units = (end - first) / kLanes;
  const auto write_one = [&](int column) {
    float z[1];
    make(column, z);
    T value;
    narrow(z[0], value);
    store_global(out + column, value);
  };
  for (int column = begin + threadIdx.x; column < first; column += blockDim.x) write_one(column);
#pragma unroll 2
  for (int unit = threadIdx.x; unit < num_units; unit += blockDim.x) {
    float z[kLanes];
    make(first + unit * kLanes, z);
    store_unit(out + first + unit * kLanes, pack(z, T()));
  }
  for (int column = first + num_units * kLanes + threadIdx.x; column < end; column += blockDim.x) write_one(column);
}

// Gradient in place of the logits z of columns [column, column + n).
template <bool kSoftcap, bool kSmoothing, int n>
__device__ __forceinline__ void gradient(float (&z)[n], int column, int target, const RowConstants& row,
                                         const CrossEntropyArgs& args) {
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const float t = kSoftcap ? tanhf(z[k] / args.softcap) : 0.0f;
    const float capped = kSoftcap ? args.softcap * t : z[k];
    float dz = exp2_approx((capped - row.max) * kLog2E) * row.scale;
    if (kSmoothing) {
      dz -= row.smooth_scale * (args.class_weight == nullptr ? 1.0f : load_global(args.class_weight + column + k));
    }
    if (column + k == target) dz = row.dtarget;
    z[k] = kSoftcap ? dz * (1.0f - t * t) : dz;
  }
}

// The columns of `slice` again, from shared memory or from global memory, as gradients.
template <class T, bool kHeld, bool kSoftcap, bool kSmoothing>
__device__ __forceinline__ void write_gradient(T* out, const Slice<T>& slice, const Unit* held, int target,
                                               const RowConstants& row, const CrossEntropyArgs& args) {
  constexpr int kLanes = Slice<T>::kLanes;
  // Rows of input and output start at the same place of a 16-byte unit unless the input is a view: then units do not
  // line up and logits are read one by one.
  const bool same = slice.shift == lanes_past_boundary(out);
  const T* const source = kHeld ? reinterpret_cast<const T*>(held) - slice.column(0) : slice.logits;
  const auto read_one = [&](int column) {
    if constexpr (kHeld) return widen(source[column]);
    else return widen(reload(source + column));
  };
  write_columns(out, slice.begin, slice.end, [&](int column, auto& z) {
    constexpr int n = sizeof(z) / sizeof(float);
    if (n == kLanes && same) {
      if constexpr (n == kLanes) {
        Unit raw;
        if constexpr (kHeld) raw = *reinterpret_cast<const Unit*>(source + column);
        else raw = reload_unit(source + column);
        unpack(raw, z, T());
      }
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) z[k] = read_one(column + k);
    }
    gradient<kSoftcap, kSmoothing, n>(z, column, target, row, args);
  });
}

// What is known of a row before its logits are read.
enum class RowKind { kLive, kSkipped, kBadTarget };

__device__ __forceinline__ RowKind kind_of(int64_t target, float row_weight, const CrossEntropyArgs& args) {
  if (target == args.ignore_index || row_weight == 0.0f) return RowKind::kSkipped;
  return target < 0 || target >= args.num_classes ? RowKind::kBadTarget : RowKind::kLive;
}

// Loss [N] and dlogits [N, V] of sum(row_weight * loss). One cluster of `cluster_size` blocks a row.
//
// A row whose target is `ignore_index` or whose weight is 0 has loss 0 and gradient 0 and none of its logits is read.
// A target outside [0, V) gives NaN for the loss of its row and `bad_gradient` for its gradient: nothing is read out of
// bounds, and the step fails visibly without a synchronisation.
//
// `dlogits` may be `logits`: a held row has been read by all blocks of its cluster, each its own slice, before any of it
// is written; of one that is read twice every element is last read by the thread that then writes it (the first reading,
// through the read-only path, ends before the barrier in front of the writing).
template <class T, bool kHeld, bool kSoftcap, bool kSmoothing>
__global__ void __launch_bounds__(kMaxThreads, 2) cross_entropy_fwd_bwd_kernel(const CrossEntropyArgs args) {
  const int rank = blockIdx.x % args.cluster_size;
  const int64_t row = blockIdx.x / args.cluster_size;
  const int64_t wide_target = load_uniform(args.target + row);
  const float row_weight = load_uniform(args.row_weight + row);
  const Slice<T> slice = slice_of(static_cast<const T*>(args.logits) + row * args.logits_row_stride, args.num_classes,
                                  rank, args.cluster_size);
  T* const out = static_cast<T*>(args.dlogits) + row * args.dlogits_row_stride;
  const bool is_writer = rank == 0 && threadIdx.x == 0;

  const RowKind kind = kind_of(wide_target, row_weight, args);
  if (kind != RowKind::kLive) {
    const float value = kind == RowKind::kSkipped ? 0.0f : args.bad_gradient;
    write_columns(out, slice.begin, slice.end, [&](int, auto& z) {
      for (float& x : z) x = value;
    });
    if (is_writer) store_global(args.loss + row, kind == RowKind::kSkipped ? 0.0f : NAN);
    return;
  }

  const int target = static_cast<int>(wide_target);
  unsigned char* const shared = dynamic_shared();
  RowConstants* const constants = reinterpret_cast<RowConstants*>(shared);
  float* const scratch = reinterpret_cast<float*>(constants + 1);
  Unit* const held = reinterpret_cast<Unit*>(shared + kHeaderBytes);
  RowStats stats = read_slice<T, kHeld, kSoftcap, kSmoothing, false>(slice, held, target, args);
  merge_row<kSmoothing, false>(stats, scratch, args.cluster_size);
  if (threadIdx.x == 0) {
    const RowLoss result = finish_row<kSmoothing>(stats, target, args);
    const float smooth_scale = kSmoothing ? row_weight * (args.label_smoothing / args.num_classes) : 0.0f;
    // (spread - hit) p - hit (1 - p), with 1 - p as the sum of the others.
    const float dtarget =
        row_weight * ((result.spread - result.hit) * (result.target_exp / result.sum) -
                      result.hit * (result.others / result.sum)) -
        smooth_scale * result.target_weight;
    *constants = {result.max, row_weight * result.spread / result.sum, smooth_scale, dtarget};
    if (is_writer) store_global(args.loss + row, result.loss);
  }
  __syncthreads();
  // A block's statistics must outlive the other blocks' reading of them; they have read once they arrive here.
  if (args.cluster_size > 1) cluster_arrive();
  write_gradient<T, kHeld, kSoftcap, kSmoothing>(out, slice, held, target, *constants, args);
  if (args.cluster_size > 1) cluster_wait();
}

// Loss, lse (fp64) and correct [N], each logit read once; one block a row, nothing held. Rows with `ignore_index` have 0, 0
// and false; a target outside [0, V) gives NaN, NaN and false.
template <class T, bool kSoftcap, bool kSmoothing>
__global__ void __launch_bounds__(kMaxThreads, 2) cross_entropy_fwd_kernel(const CrossEntropyArgs args) {
  const int64_t row = blockIdx.x;
  const int64_t wide_target = load_uniform(args.target + row);
  const RowKind kind = kind_of(wide_target, 1.0f, args);
  if (kind != RowKind::kLive) {
    if (threadIdx.x == 0) {
      const float value = kind == RowKind::kSkipped ? 0.0f : NAN;
      store_global(args.loss + row, value);
      store_global(args.lse + row, static_cast<double>(value));
      store_global(args.correct + row, false);
    }
    return;
  }
  const int target = static_cast<int>(wide_target);
  const Slice<T> slice =
      slice_of(static_cast<const T*>(args.logits) + row * args.logits_row_stride, args.num_classes, 0, 1);
  RowStats stats = read_slice<T, false, kSoftcap, kSmoothing, true>(slice, nullptr, target, args);
  merge_row<kSmoothing, true>(stats, reinterpret_cast<float*>(dynamic_shared()), 1);
  if (threadIdx.x == 0) {
    const RowLoss result = finish_row<kSmoothing>(stats, target, args);
    store_global(args.loss + row, result.loss);
    store_global(args.lse + row, static_cast<double>(result.max) + result.log_sum);
    // The first of equal maxima is the prediction, as in torch.argmax; a row without a softmax has none.
    const bool is_prediction = stats.target >= stats.max && stats.target > stats.max_before;
    store_global(args.correct + row, is_prediction && !isnan(result.log_sum));
  }
}

// The instantiation for a call: by value, so that launcher and host harness make the same choice.
using CrossEntropyKernel = void (*)(CrossEntropyArgs);

template <class T, bool kHeld>
CrossEntropyKernel fwd_bwd_kernel(bool has_softcap, bool has_smoothing) {
  if (has_softcap) {
    return has_smoothing ? cross_entropy_fwd_bwd_kernel<T, kHeld, true, true>
                         : cross_entropy_fwd_bwd_kernel<T, kHeld, true, false>;
  }
  return has_smoothing ? cross_entropy_fwd_bwd_kernel<T, kHeld, false, true>
                       : cross_entropy_fwd_bwd_kernel<T, kHeld, false, false>;
}

template <class T>
CrossEntropyKernel fwd_kernel(bool has_softcap, bool has_smoothing) {
  if (has_softcap) {
    return has_smoothing ? cross_entropy_fwd_kernel<T, true, true> : cross_entropy_fwd_kernel<T, true, false>;
  }
  return has_smoothing ? cross_entropy_fwd_kernel<T, false, true> : cross_entropy_fwd_kernel<T, false, false>;
}

}  // namespace flow_kernels
