// CUDA's names on the host, for csrc/cuda/*.cuh: see simt.h for what executes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../simt.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local

#define threadIdx (simt::current().thread_index)
#define blockIdx (simt::current().block_index)
#define blockDim (simt::current().block_size)
#define gridDim (simt::current().grid_size)

#define __syncthreads() simt::sync_block(__FILE__, __LINE__)
#define __syncwarp() simt::sync_warp(__FILE__, __LINE__)
#define __threadfence() simt::fence(__FILE__, __LINE__)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using std::max;
using std::min;

template <class To, class From>
inline To bits_as(const From& from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, unsigned shift) {
  return static_cast<uint32_t>((uint64_t(high) << 32 | low) >> (shift & 31));
}

template <class T>
inline T __ldcs(const T* p) {
  simt::require_aligned(p, alignof(T));
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, const T& x) {
  simt::require_aligned(p, alignof(T));
  *p = x;
}

template <class T>
inline T __shfl_sync(unsigned, T x, int lane) {
  return simt::exchange(x, "shfl", [&](const T* all, int) { return all[lane & 31]; });
}
template <class T>
inline T __shfl_xor_sync(unsigned, T x, int mask) {
  return simt::exchange(x, "shfl_xor", [&](const T* all, int self) { return all[self ^ mask]; });
}
template <class T>
inline T __shfl_up_sync(unsigned, T x, int offset) {
  return simt::exchange(x, "shfl_up", [&](const T* all, int self) {
    return all[self < offset ? self : self - offset];
  });
}
inline int __reduce_max_sync(unsigned, int x) {
  return simt::exchange(x, "reduce_max",
                        [](const int* all, int) { return *std::max_element(all, all + 32); });
}
inline int __reduce_add_sync(unsigned, int x) {
  return simt::exchange(x, "reduce_add", [](const int* all, int) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += all[i];
    return sum;
  });
}
inline unsigned __ballot_sync(unsigned, bool x) {
  return simt::exchange<uint32_t>(x, "ballot", [](const uint32_t* all, int) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= all[i] << i;
    return bits;
  });
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == ~0u; }

inline int atomicAdd(int* p, int x) { return simt::atomic_add(p, x); }
