// A thread's scratch memory, cut into buffers: with a null base it only counts their bytes.
#pragma once
#include "api.h"

namespace flow_kernels {
namespace FLOW_ISA {

struct Room {
  char* base;
  int64_t bytes = 0;
  template <class T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(base + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
};

}  // namespace FLOW_ISA
}  // namespace flow_kernels
