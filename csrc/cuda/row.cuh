// One row of logits and the part of it that a block reads: statistics on the way in, merged over warps and blocks.
// Formulas and the reasons for them are in cross_entropy.cuh.
#pragma once

#ifdef __CUDACC__
#include "device.cuh"
#else
#include "host_cuda.h"
#endif

#include "plan.h"

namespace flow_kernels {

constexpr float kLog2E = 1.44269504088896341f;
// Parts in which a thread's share of the row arrives: it computes on the first while the other three are under way.
constexpr int kStages = 4;

struct CrossEntropyArgs {
  const void* logits;         // [N, V], unit column stride
  const int64_t* target;      // [N]
  const float* row_weight;    // [N]; forward with gradient only
  const float* class_weight;  // [V] or null
  void* dlogits;              // [N, V], unit column stride, may be logits; forward with gradient only
  float* loss;                // [N]
  double* lse;                // [N]; forward only
  bool* correct;              // [N]; forward only
  int64_t logits_row_stride;  // in elements
  int64_t dlogits_row_stride;
  int64_t ignore_index;
  int num_classes;
  int cluster_size;
  float label_smoothing, softcap, z_loss;
  float bad_gradient;  // of rows whose target is outside [0, V)
};

// Statistics of a part of a row, all in fp32; columns other than the target unless said otherwise.
struct RowStats {
  float max = -INFINITY;
  float sum = 0.0f;              // of exp(z - max)
  float target = 0.0f;           // the target's logit in the part that holds it, else 0: parts add up, NaN included
  float smooth = 0.0f;           // sum of weight_j z_j
  float weight = 0.0f;           // sum of weight_j
  float max_before = -INFINITY;  // over columns before the target
};

// What the gradient needs to know of a row: dz_j = scale exp(z_j - max) - smooth_scale weight_j, and dtarget.
struct RowConstants {
  float max, scale, smooth_scale, dtarget;
};

// The part of a row that one block takes, in 16-byte units counted from the boundary at or below the row's start.
template <class T>
struct Slice {
  static constexpr int kLanes = kUnitBytes / sizeof(T);
  const T* logits;       // column 0
  int shift;             // columns between the 16-byte boundary and column 0
  int first_unit, num_units, last_unit_of_row;
  int begin, end;        // columns of this block

  __device__ __forceinline__ int column(int unit) const { return (first_unit + unit) * kLanes - shift; }
  __device__ __forceinline__ bool is_whole(int unit) const {
    const int u = first_unit + unit;
    return (u > 0 || shift == 0) && u < last_unit_of_row;
  }
};

template <class T>
__device__ __forceinline__ int lanes_past_boundary(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kUnitBytes / sizeof(T));
}

template <class T>
__device__ __forceinline__ Slice<T> slice_of(const T* logits, int num_classes, int rank, int cluster_size) {
  Slice<T> slice;
  constexpr int kLanes = Slice<T>::kLanes;
  slice.logits = logits;
  slice.shift = lanes_past_boundary(logits);
  const int units = (slice.shift + num_classes + kLanes - 1) / kLanes;
  const int per_block = (units + cluster_size - 1) / cluster_size;
  // The row's last unit counts as whole only if the row ends with it.
  slice.last_unit_of_row = (slice.shift + num_classes) / kLanes;
  slice.first_unit = rank * per_block;
  slice.num_units = max(0, min(per_block, units - slice.first_unit));
  slice.begin = min(num_classes, max(0, slice.column(0)));
  slice.end = max(slice.begin, min(num_classes, slice.column(slice.num_units)));
  return slice;
}

__device__ __forceinline__ float exp_difference(float a, float b) {
  // Equal infinities: 1, not exp(NaN).
  return a == b ? 1.0f : exp2_approx((a - b) * kLog2E);
}

template <bool kSmoothing, bool kCorrect>
__device__ __forceinline__ void merge(RowStats& a, const RowStats& b) {
  const float largest = fmaxf(a.max, b.max);
  a.sum = a.sum * exp_difference(a.max, largest) + b.sum * exp_difference(b.max, largest);
  a.max = largest;
  a.target += b.target;
  if (kSmoothing) {
    a.smooth += b.smooth;
    a.weight += b.weight;
  }
  if (kCorrect) a.max_before = fmaxf(a.max_before, b.max_before);
}

// Over the lanes of the warp; lane 0 has the result.
template <bool kSmoothing, bool kCorrect>
__device__ __forceinline__ void merge_lanes(RowStats& stats) {
  for (int offset = 16; offset > 0; offset /= 2) {
    RowStats other;
    other.max = __shfl_xor_sync(0xffffffffu, stats.max, offset);
    other.sum = __shfl_xor_sync(0xffffffffu, stats.sum, offset);
    other.target = __shfl_xor_sync(0xffffffffu, stats.target, offset);
    if (kSmoothing) {
      other.smooth = __shfl_xor_sync(0xffffffffu, stats.smooth, offset);
      other.weight = __shfl_xor_sync(0xffffffffu, stats.weight, offset);
    }
    if (kCorrect) other.max_before = __shfl_xor_sync(0xffffffffu, stats.max_before, offset);
    merge<kSmoothing, kCorrect>(stats, other);
  }
}

// Add the logits of unit `unit` of the slice to the statistics. NaN reaches the sum, never the maximum.
template <class T, bool kSoftcap, bool kSmoothing, bool kCorrect>
__device__ __forceinline__ void add_unit(RowStats& stats, const Slice<T>& slice, int unit, const Unit& raw, int target,
                                         const CrossEntropyArgs& args) {
  constexpr int kLanes = Slice<T>::kLanes;
  const int column = slice.column(unit);
  float z[kLanes];
  unpack(raw, z, T());
  if (kSoftcap) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) z[k] = args.softcap * tanhf(z[k] / args.softcap);
  }
  unsigned keep = (1u << kLanes) - 1;
  const bool has_target = static_cast<unsigned>(target - column) < static_cast<unsigned>(kLanes);
  if (has_target || !slice.is_whole(unit)) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if (column + k == target) stats.target = z[k];
      if (column + k < 0 || column + k >= args.num_classes || column + k == target) {
        keep &= ~(1u << k);
        z[k] = -INFINITY;
      }
      if (kCorrect && column + k < target) stats.max_before = fmaxf(stats.max_before, z[k]);
    }
  }
  float largest = z[0];
#pragma unroll
  for (int k = 1; k < kLanes; ++k) largest = fmaxf(largest, z[k]);
  if (kCorrect && column + kLanes <= target) stats.max_before = fmaxf(stats.max_before, largest);
  if (largest > stats.max) {
    stats.sum *= exp2_approx((stats.max - largest) * kLog2E);
    stats.max = largest;
  }
  const float origin = stats.max == -INFINITY ? 0.0f : stats.max;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) stats.sum += exp2_approx((z[k] - origin) * kLog2E);
  if (kSmoothing) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if (keep >> k & 1) {
        const float weight = args.class_weight == nullptr ? 1.0f : load_global(args.class_weight + column + k);
        stats.smooth += weight * z[k];
        stats.weight += weight;
      }
    }
  }
}

// A unit that reaches over an end of the row is put together from single logits: nothing outside the row is read.
template <class T>
__device__ __forceinline__ Unit load_partial(const Slice<T>& slice, int unit, int num_classes) {
  constexpr int kLanes = Slice<T>::kLanes;
  float z[kLanes];
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    const int column = slice.column(unit) + k;
    z[k] = column >= 0 && column < num_classes ? widen(load_global(slice.logits + column)) : 0.0f;
  }
  return pack(z, T());
}

// Statistics of this thread's units. A held row goes to shared memory on the way; a thread reads here only what it has
// copied itself, so waiting for its own copies is enough.
template <class T, bool kHeld, bool kSoftcap, bool kSmoothing, bool kCorrect>
__device__ __forceinline__ RowStats read_slice(const Slice<T>& slice, Unit* held, int target,
                                               const CrossEntropyArgs& args) {
  RowStats stats;
  const int step = blockDim.x;
  if constexpr (kHeld) {
    const int per_thread = (slice.num_units + step - 1) / step;
    const int stride = (per_thread + kStages - 1) / kStages * step;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const int end = min(slice.num_units, (stage + 1) * stride);
      for (int unit = stage * stride + threadIdx.x; unit < end; unit += step) {
        if (slice.is_whole(unit)) {
          copy_async(held + unit, slice.logits + slice.column(unit));
        } else {
          held[unit] = load_partial(slice, unit, args.num_classes);
        }
      }
      copy_commit();
    }
    const auto add_stage = [&](int stage) {
      const int end = min(slice.num_units, (stage + 1) * stride);
      for (int unit = stage * stride + threadIdx.x; unit < end; unit += step) {
        add_unit<T, kSoftcap, kSmoothing, kCorrect>(stats, slice, unit, held[unit], target, args);
      }
    };
    static_assert(kStages == 4, "one wait for each stage");
    copy_wait<3>();
    add_stage(0);
    copy_wait<2>();
    add_stage(1);
    copy_wait<1>();
    add_stage(2);
    copy_wait<0>();
    add_stage(3);
  } else {
#pragma unroll 4
    for (int unit = threadIdx.x; unit < slice.num_units; unit += step) {
      const Unit raw = slice.is_whole(unit) ? load_unit(slice.logits + slice.column(unit))
                                            : load_partial(slice, unit, args.num_classes);
      add_unit<T, kSoftcap, kSmoothing, kCorrect>(stats, slice, unit, raw, target, args);
    }
  }
  return stats;
}

// Statistics of the row, in lane 0 of warp 0 of every block of the cluster, the same bits in all blocks: warps are
// merged in a fixed tree, then blocks are.
template <bool kSmoothing, bool kCorrect>
__device__ __forceinline__ void merge_row(RowStats& stats, float* scratch, int cluster_size) {
  constexpr int kFields = sizeof(RowStats) / sizeof(float);
  RowStats* warps = reinterpret_cast<RowStats*>(scratch);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  merge_lanes<kSmoothing, kCorrect>(stats);
  if (lane == 0) warps[warp] = stats;
  __syncthreads();
  if (warp == 0) {
    stats = lane < num_warps ? warps[lane] : RowStats();
    merge_lanes<kSmoothing, kCorrect>(stats);
    if (cluster_size > 1 && lane == 0) warps[num_warps] = stats;
  }
  if (cluster_size > 1) {
    cluster_arrive();
    cluster_wait();
    if (warp == 0) {
      stats = RowStats();
      if (lane < cluster_size) {
        float* fields = &stats.max;
#pragma unroll
        for (int f = 0; f < kFields; ++f) fields[f] = load_remote(&warps[num_warps].max + f, lane);
      }
      merge_lanes<kSmoothing, kCorrect>(stats);
    }
  }
}

struct RowLoss {
  float loss, lse, log_sum, max, sum, others, target_exp, hit, spread, target_weight;
};

// The target joins the statistics of the other columns.
template <bool kSmoothing>
__device__ __forceinline__ RowLoss finish_row(const RowStats& stats, int target, const CrossEntropyArgs& args) {
  RowLoss row;
  const float z = stats.target;
  row.target_weight = args.class_weight == nullptr ? 1.0f : load_global(args.class_weight + target);
  row.max = fmaxf(stats.max, z);
  row.others = stats.sum * exp_difference(stats.max, row.max);
  row.target_exp = exp_difference(z, row.max);
  // A row whose largest logit is infinite has no softmax: NaN in the loss and in the gradient, as in the reference.
  row.sum = fabsf(row.max) == INFINITY ? NAN : row.others + row.target_exp;
  row.log_sum = z == row.max && fabsf(z) != INFINITY ? log1pf(row.others) : logf(row.sum);
  row.lse = row.max + row.log_sum;
  row.hit = (1.0f - args.label_smoothing) * row.target_weight;
  row.spread = row.hit + 2.0f * args.z_loss * row.lse;
  row.loss = row.hit * ((row.max - z) + row.log_sum);
  if (kSmoothing) {
    const float share = args.label_smoothing / args.num_classes;
    const float smooth = stats.smooth + row.target_weight * z, weight = stats.weight + row.target_weight;
    row.loss += args.class_weight == nullptr ? args.label_smoothing * (row.lse - smooth / args.num_classes)
                                             : share * (row.lse * weight - smooth);
    row.spread += args.class_weight == nullptr ? args.label_smoothing : share * weight;
  }
  row.loss += args.z_loss * row.lse * row.lse;
  return row;
}

}  // namespace flow_kernels
