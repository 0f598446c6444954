// The names of csrc/cuda/device.cuh and of the CUDA language, for the host: kernels compile as C++ and run, one fiber a
// thread, all blocks of a cluster at once, on one CPU thread.
//
// What it makes visible that a GPU hides: shared memory starts as NaN bits and becomes NaN when its block has ended; an
// asynchronous copy lands when its group is waited for and not before; threads run in an order drawn from a seed, anew
// in every round, and blocks fall behind each other; shared memory is a heap block of exactly the size asked for, so
// AddressSanitizer sees its ends.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace host_cuda {

constexpr int kWarpSize = 32;
// Kernels keep a few hundred bytes a frame; AddressSanitizer's redzones multiply that.
constexpr size_t kStackBytes = 64 * 1024;

struct Dim {
  unsigned x = 1;
};

struct Counters {
  uint64_t bytes_loaded = 0, bytes_stored = 0, unit_loads = 0, unit_stores = 0;
};

// A barrier: a thread that arrives gets a ticket, and may pass when everyone has arrived.
struct Gate {
  int expected = 0, arrived = 0;
  uint64_t passed = 0;

  uint64_t arrive() {
    const uint64_t ticket = passed;
    if (++arrived == expected) {
      arrived = 0;
      ++passed;
    }
    return ticket;
  }
};

struct Warp {
  Gate gate;
  // Two sets in turn: no thread can be two shuffles ahead of another.
  uint32_t slots[2][kWarpSize];
};

struct Block {
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
  Gate gate;
  std::vector<Warp> warps;
  int num_alive = 0;
  unsigned index = 0;
};

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Dim thread;
  Block* block = nullptr;
  const Gate* waits_at = nullptr;
  uint64_t ticket = 0, cluster_ticket = 0;
  int num_shuffles = 0, num_groups = 0;
  std::vector<Copy> copies;
  bool is_done = false;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> blocks;  // of the running cluster
  Gate cluster_gate;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  void (*entry)(const void*) = nullptr;
  const void* entry_argument = nullptr;
  Dim block_dim;
  Counters counters;
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

inline Fiber& current() { return *machine().current; }

inline void wait_at(const Gate& gate, uint64_t ticket) {
  if (gate.passed != ticket) return;
  Fiber& fiber = current();
  fiber.waits_at = &gate;
  fiber.ticket = ticket;
  swapcontext(&fiber.context, &machine().scheduler);
}

inline void fiber_main() {
  machine().entry(machine().entry_argument);
  Fiber& fiber = current();
  fiber.is_done = true;
  if (--fiber.block->num_alive == 0) memset(fiber.block->shared.get(), 0xff, fiber.block->shared_bytes);
  swapcontext(&fiber.context, &machine().scheduler);
}

// Run one cluster to its end: rounds over all threads that can go on, shuffled if there is a seed. With a cluster of
// one block a stall only reshuffles.
inline void run_cluster(int cluster_size, int num_threads, unsigned first_block, size_t shared_bytes, bool is_shuffled,
                        std::mt19937_64& random) {
  Machine& m = machine();
  m.blocks = std::vector<Block>(cluster_size);
  m.cluster_gate = Gate{cluster_size * num_threads};
  while (m.fibers.size() < static_cast<size_t>(cluster_size * num_threads)) {
    m.fibers.push_back(std::make_unique<Fiber>());
    m.fibers.back()->stack.reset(new char[kStackBytes]);
  }
  std::vector<Fiber*> alive;
  for (int b = 0; b < cluster_size; ++b) {
    Block& block = m.blocks[b];
    block.shared.reset(new unsigned char[shared_bytes]);
    memset(block.shared.get(), 0xff, shared_bytes);
    block.shared_bytes = shared_bytes;
    block.gate.expected = block.num_alive = num_threads;
    block.index = first_block + b;
    block.warps = std::vector<Warp>(num_threads / kWarpSize);
    for (Warp& warp : block.warps) warp.gate.expected = kWarpSize;
    for (int t = 0; t < num_threads; ++t) {
      Fiber& fiber = *m.fibers[b * num_threads + t];
      fiber.thread.x = t;
      fiber.block = &block;
      fiber.waits_at = nullptr;
      fiber.num_shuffles = fiber.num_groups = 0;
      fiber.copies.clear();
      fiber.is_done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
      alive.push_back(&fiber);
    }
  }
  // A block that does not get to run for some rounds: on a GPU nothing keeps blocks, or warps, in step.
  const Block* stalled = nullptr;
  uint64_t stalled_rounds = 0;
  while (!alive.empty()) {
    if (is_shuffled) {
      std::shuffle(alive.begin(), alive.end(), random);
      if (stalled_rounds == 0) {
        stalled = &m.blocks[random() % cluster_size];
        stalled_rounds = random() % 64;
      } else {
        --stalled_rounds;
      }
    }
    bool has_moved = false;
    for (Fiber* fiber : alive) {
      if (fiber->block == stalled && stalled_rounds > 0) continue;
      if (fiber->waits_at != nullptr && fiber->waits_at->passed == fiber->ticket) continue;
      fiber->waits_at = nullptr;
      has_moved = true;
      m.current = fiber;
      swapcontext(&m.scheduler, &fiber->context);
    }
    if (!has_moved && stalled_rounds > 0) {
      stalled_rounds = 0;
    } else if (!has_moved) {
      fprintf(stderr, "host_cuda: every thread waits at a barrier that not all of them reach\n");
      abort();
    }
    alive.erase(std::remove_if(alive.begin(), alive.end(), [](Fiber* f) { return f->is_done; }), alive.end());
  }
}

template <class Args>
struct Call {
  void (*kernel)(Args);
  const Args* args;
};

// What `kernel<<<num_blocks, num_threads, shared_bytes>>>(args)` does, in clusters of `cluster_size` blocks. Seed 0
// runs threads by index.
template <class Args>
Counters launch(void (*kernel)(Args), const Args& args, int64_t num_blocks, int cluster_size, int num_threads,
                size_t shared_bytes, uint64_t seed) {
  Machine& m = machine();
  const Call<Args> call{kernel, &args};
  m.entry = [](const void* argument) {
    const auto* c = static_cast<const Call<Args>*>(argument);
    c->kernel(*c->args);
  };
  m.entry_argument = &call;
  m.block_dim.x = num_threads;
  m.counters = Counters();
  std::mt19937_64 random(seed);
  for (int64_t block = 0; block < num_blocks; block += cluster_size) {
    run_cluster(cluster_size, num_threads, static_cast<unsigned>(block), shared_bytes, seed != 0, random);
  }
  return m.counters;
}

inline Dim block_index() {
  Dim index;
  index.x = current().block->index;
  return index;
}

}  // namespace host_cuda

#define threadIdx (::host_cuda::current().thread)
#define blockIdx (::host_cuda::block_index())
#define blockDim (::host_cuda::machine().block_dim)

inline void __syncthreads() {
  host_cuda::Gate& gate = host_cuda::current().block->gate;
  host_cuda::wait_at(gate, gate.arrive());
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  using namespace host_cuda;
  Fiber& fiber = current();
  Warp& warp = fiber.block->warps[fiber.thread.x / kWarpSize];
  const int lane = fiber.thread.x % kWarpSize, set = fiber.num_shuffles++ % 2;
  memcpy(&warp.slots[set][lane], &value, sizeof(value));
  wait_at(warp.gate, warp.gate.arrive());
  memcpy(&value, &warp.slots[set][lane ^ mask], sizeof(value));
  return value;
}

// Storage types of CUDA's names; arithmetic is done in float alone.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

namespace flow_kernels {

using std::max;
using std::min;

struct alignas(16) Unit {
  uint32_t word[4];
};

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;  // false for NaN
}

inline unsigned char* dynamic_shared() { return host_cuda::current().block->shared.get(); }

inline float widen(float x) { return x; }
inline float widen(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof(y));
  return y;
}
inline float widen(__half x) {
  _Float16 y;
  memcpy(&y, &x.bits, sizeof(y));
  return static_cast<float>(y);
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, __nv_bfloat16& y) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) {
    y.bits = 0x7fff;
  } else {
    // Round to nearest, ties to even.
    y.bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}
inline void narrow(float x, __half& y) {
  const _Float16 rounded = static_cast<_Float16>(x);
  memcpy(&y.bits, &rounded, sizeof(y.bits));
}

template <class T, int n>
void unpack(const Unit& unit, float (&z)[n], T) {
  T values[n];
  static_assert(sizeof(values) == sizeof(Unit), "a unit is 16 bytes");
  memcpy(values, &unit, sizeof(unit));
  for (int k = 0; k < n; ++k) z[k] = widen(values[k]);
}

template <class T, int n>
Unit pack(const float (&z)[n], T) {
  T values[n];
  for (int k = 0; k < n; ++k) narrow(z[k], values[k]);
  Unit unit;
  memcpy(&unit, values, sizeof(unit));
  return unit;
}

inline void require_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fprintf(stderr, "host_cuda: an access of %zu bytes at %p is not aligned\n", bytes, pointer);
    abort();
  }
}

inline Unit load_unit(const void* from) {
  require_aligned(from, sizeof(Unit));
  host_cuda::machine().counters.bytes_loaded += sizeof(Unit);
  host_cuda::machine().counters.unit_loads += 1;
  return *static_cast<const Unit*>(from);
}
template <class T>
T load_global(const T* from) {
  require_aligned(from, sizeof(T));
  host_cuda::machine().counters.bytes_loaded += sizeof(T);
  return *from;
}
inline Unit reload_unit(const void* from) { return load_unit(from); }
template <class T>
T reload(const T* from) {
  return load_global(from);
}
// Counted once a warp.
template <class T>
T load_uniform(const T* from) {
  require_aligned(from, sizeof(T));
  if (host_cuda::current().thread.x % host_cuda::kWarpSize == 0) {
    host_cuda::machine().counters.bytes_loaded += sizeof(T);
  }
  return *from;
}
inline void store_unit(void* to, const Unit& unit) {
  require_aligned(to, sizeof(Unit));
  host_cuda::machine().counters.bytes_stored += sizeof(Unit);
  host_cuda::machine().counters.unit_stores += 1;
  *static_cast<Unit*>(to) = unit;
}
template <class T>
void store_global(T* to, T value) {
  require_aligned(to, sizeof(T));
  host_cuda::machine().counters.bytes_stored += sizeof(T);
  *to = value;
}

inline void copy_async(void* shared, const void* global) {
  require_aligned(shared, sizeof(Unit));
  require_aligned(global, sizeof(Unit));
  host_cuda::machine().counters.bytes_loaded += sizeof(Unit);
  host_cuda::machine().counters.unit_loads += 1;
  host_cuda::Fiber& fiber = host_cuda::current();
  fiber.copies.push_back({shared, global, fiber.num_groups});
}
inline void copy_commit() { host_cuda::current().num_groups += 1; }
template <int kPending>
void copy_wait() {
  host_cuda::Fiber& fiber = host_cuda::current();
  size_t kept = 0;
  for (const host_cuda::Copy& copy : fiber.copies) {
    if (copy.group < fiber.num_groups - kPending) {
      memcpy(copy.to, copy.from, sizeof(Unit));
    } else {
      fiber.copies[kept++] = copy;
    }
  }
  fiber.copies.resize(kept);
}

inline void cluster_arrive() { host_cuda::current().cluster_ticket = host_cuda::machine().cluster_gate.arrive(); }
inline void cluster_wait() {
  host_cuda::wait_at(host_cuda::machine().cluster_gate, host_cuda::current().cluster_ticket);
}
inline float load_remote(const float* shared, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(shared) - dynamic_shared();
  float value;
  memcpy(&value, host_cuda::machine().blocks[rank].shared.get() + offset, sizeof(value));
  return value;
}

}  // namespace flow_kernels
