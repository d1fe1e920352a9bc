// Sixteen bytes of a row at a time, whatever its alignment.
//
// A lane always works on the same elements of a row, counted from the row's start, so that the
// results depend on what a row holds and never on where it lies. A row that starts at an odd
// address (V = 50257, a slice) is still read by aligned 16-byte loads: a vector is then cut out of
// the two that it straddles, its lane's and the neighbour's. Aligned vectors that stick out of the
// row at its head or tail are read and written element by element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../scalar_math.h"

namespace dpo_kernels::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;
constexpr int kVectorsPerLane = 4;

struct alignas(kVectorBytes) Vector {
  uint32_t word[4];
};

struct Float32 {
  using Bits = uint32_t;
  static constexpr int kPerWord = 1;
  static constexpr uint32_t kSigns = 0x80000000u;
  static constexpr uint32_t kLowest = 0xff800000u;

  static __device__ __forceinline__ float unpack(uint32_t word, int) {
    return __uint_as_float(word);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float) { return __float_as_uint(low); }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kPerWord = 2;
  static constexpr uint32_t kSigns = 0x80008000u;
  static constexpr uint32_t kLowest = 0xff80ff80u;

  static __device__ __forceinline__ float unpack(uint32_t word, int half) {
    return __uint_as_float(half == 0 ? word << 16 : word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    const __nv_bfloat162 larger = __hmax2(reinterpret_cast<const __nv_bfloat162&>(a),
                                          reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(larger);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr int kPerWord = 2;
  static constexpr uint32_t kSigns = 0x80008000u;
  static constexpr uint32_t kLowest = 0xfc00fc00u;

  static __device__ __forceinline__ float unpack(uint32_t word, int half) {
    const __half2& pair = reinterpret_cast<const __half2&>(word);
    return half == 0 ? __low2float(pair) : __high2float(pair);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    const __half2 larger =
        __hmax2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const uint32_t&>(larger);
  }
};

// the word with its element `part` replaced by -inf
template <class E>
__device__ __forceinline__ uint32_t without(uint32_t word, int part) {
  const uint32_t kept = E::kPerWord == 1 ? 0 : part == 0 ? 0xffff0000u : 0x0000ffffu;
  return (word & kept) | (E::kLowest & ~kept);
}

template <class E>
constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(typename E::Bits));

// What a warp reads at once: 2 KiB, all of it in flight before the first element is used.
template <class E>
constexpr int kSegment = kWarpSize * kVectorsPerLane * kPerVector<E>;

// The unit of work, and of every reduction over a row: 8 KiB of one row, by one warp. Combining the
// spans of a row in a fixed order is what keeps the bits when several warps share it.
constexpr int kSegmentsPerSpan = 4;
template <class E>
constexpr int kSpan = kSegmentsPerSpan * kSegment<E>;

// element (word w, part h) of a lane's vector v, counted from the lane's first element
template <class E>
__device__ __forceinline__ int element_offset(int v, int w, int h) {
  return v * kWarpSize * kPerVector<E> + w * E::kPerWord + h;
}

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarpSize; }

__device__ __forceinline__ unsigned misalignment(const void* address, int bytes = kVectorBytes) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(address) % bytes);
}

__device__ __forceinline__ Vector load_streaming(const void* address) {
  const uint4 raw = __ldcs(static_cast<const uint4*>(address));
  return {{raw.x, raw.y, raw.z, raw.w}};
}

// the 16 bytes that start `skew` bytes into low|high
__device__ __forceinline__ Vector cut(const Vector& low, const Vector& high, unsigned skew) {
  uint32_t w[8] = {low.word[0],  low.word[1],  low.word[2],  low.word[3],
                   high.word[0], high.word[1], high.word[2], high.word[3]};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = skew & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = skew & 4 ? w[i + 1] : w[i];
  Vector out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.word[i] = __funnelshift_r(w[i], w[i + 1], (skew & 3) * 8);
  return out;
}

// A vector that sticks out of its row: 0 outside. Elements enter at the top and move down, as a
// register cannot be indexed; a loop, as it is rare and must not cost the others registers.
template <class E>
__device__ __forceinline__ Vector load_edge(const typename E::Bits* row, int first, int vocab) {
  constexpr int kShift = 32 / E::kPerWord % 32;
  Vector x = {{0, 0, 0, 0}};
#pragma unroll 1
  for (int i = 0; i < kPerVector<E>; ++i) {
    const int v = first + i;
    const uint32_t bits = v >= 0 && v < vocab ? row[v] : 0;
    const uint32_t w[5] = {x.word[0], x.word[1], x.word[2], x.word[3], bits};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x.word[k] = kShift == 0 ? w[k + 1] : __funnelshift_r(w[k], w[k + 1], kShift);
    }
  }
  return x;
}

// A lane's vectors of the segment that begins at element `begin`, its address `skew` bytes behind
// an aligned one.
template <class E>
__device__ __forceinline__ void load_segment(Vector (&x)[kVectorsPerLane],
                                             const typename E::Bits* row, int begin, int vocab,
                                             unsigned skew) {
  constexpr int kPer = kPerVector<E>;
  const int lane = lane_id();
  const int aligned_begin = begin - static_cast<int>(skew / sizeof(typename E::Bits));
  const auto load = [&](int first) {
    return first >= 0 && first + kPer <= vocab ? load_streaming(row + first)
                                               : load_edge<E>(row, first, vocab);
  };
  // the segment, and behind it the vector that an odd row straddles
  if (aligned_begin >= 0 && aligned_begin + kSegment<E> <= vocab) {
    const typename E::Bits* const from = row + aligned_begin + lane * kPer;
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
      x[v] = load_streaming(from + element_offset<E>(v, 0, 0));
    }
  } else {
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
      x[v] = load(aligned_begin + lane * kPer + element_offset<E>(v, 0, 0));
    }
  }
  if (skew == 0) return;
  const Vector behind = load(aligned_begin + kSegment<E>);
#pragma unroll
  for (int v = 0; v < kVectorsPerLane; ++v) {
    const Vector& next = v + 1 < kVectorsPerLane ? x[v + 1] : behind;
    Vector high;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t offered = lane == 0 ? next.word[w] : x[v].word[w];
      high.word[w] = __shfl_sync(kAllLanes, offered, (lane + 1) % kWarpSize);
    }
    x[v] = cut(x[v], high, skew);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// x must not be NaN. Integers compare like the floats whose bits they are, once the negative ones
// have all but their sign flipped.
__device__ __forceinline__ float warp_max(float x) {
  const int bits = __float_as_int(x);
  const int largest = __reduce_max_sync(kAllLanes, bits ^ (bits >> 31 & 0x7fffffff));
  return __int_as_float(largest ^ (largest >> 31 & 0x7fffffff));
}

}  // namespace dpo_kernels::cuda
