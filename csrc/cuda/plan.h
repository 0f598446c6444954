// Where a row of logits is held and by how many blocks: plain C++, so tests read it without a GPU.
#pragma once

#include <stdint.h>

namespace flow_kernels {

constexpr int kUnitBytes = 16;
constexpr int kMaxThreads = 512;
// The statistics of up to 32 warps and the constants of the row, in front of the row in shared memory.
constexpr int kHeaderBytes = 1024;
// The hardware keeps 1 KiB of shared memory for itself in every resident block (CUDA programming guide, 16.7.3).
constexpr int kReservedBytes = 1024;

struct Plan {
  bool held;         // the row stays in shared memory between the two sweeps over it; else it is read twice
  int cluster_size;  // blocks that share a row
  int num_threads;   // of a block
  int shared_bytes;  // dynamic shared memory of a block
};

struct Device {
  int shared_bytes_per_block;  // cudaDevAttrMaxSharedMemoryPerBlockOptin
  int shared_bytes_per_sm;     // cudaDevAttrMaxSharedMemoryPerMultiprocessor
  int max_cluster_size;        // 1 below sm_90, 8 portably, 16 where the device accepts it
};

// Blocks take 16-byte units of the row; an unaligned row start costs one more unit.
inline int64_t units_per_block(int64_t num_classes, int element_bytes, int cluster_size) {
  const int64_t lanes = kUnitBytes / element_bytes;
  const int64_t units = (num_classes + lanes - 1 + lanes - 1) / lanes;
  return (units + cluster_size - 1) / cluster_size;
}

inline Plan plan_row(int64_t num_classes, int element_bytes, const Device& device) {
  Plan plan{false, 1, 0, kHeaderBytes};
  // Two blocks an SM: one loads its row while the other computes. Beyond that, one block an SM with all its memory.
  const int64_t half = device.shared_bytes_per_sm / 2 - kReservedBytes;
  const int64_t budgets[] = {half < device.shared_bytes_per_block ? half : device.shared_bytes_per_block,
                             device.shared_bytes_per_block};
  for (const int max_cluster_size : {8, 16}) {
    for (const int64_t budget : budgets) {
      for (int size = 1; !plan.held && size <= max_cluster_size && size <= device.max_cluster_size; size *= 2) {
        const int64_t bytes = kHeaderBytes + units_per_block(num_classes, element_bytes, size) * kUnitBytes;
        if (bytes <= budget) plan = {true, size, 0, static_cast<int>(bytes)};
      }
    }
  }
  // At least two units a thread, so that loads overlap; more threads than 512 would halve the registers.
  const int64_t units = units_per_block(num_classes, element_bytes, plan.cluster_size);
  plan.num_threads = units <= 256 ? 128 : units <= 1024 ? 256 : kMaxThreads;
  return plan;
}

}  // namespace flow_kernels
