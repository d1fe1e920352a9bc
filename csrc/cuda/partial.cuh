// What is known of some elements of a row, the label's left out, and how two such parts are joined.
#pragma once

#include "elements.cuh"

namespace dpo_kernels::cuda {

template <bool kStats>
struct Partial {
  SoftmaxSum<float> softmax;
};

template <>
struct Partial<true> {
  SoftmaxSum<float> softmax;
  StatSums<float> stats;
  float beats_target;  // 1 when an element ranks before the target
};

template <bool kStats>
constexpr int kPartialWords = sizeof(Partial<kStats>) / sizeof(float2);

template <bool kStats>
__device__ __forceinline__ void store_partial(float2* to, const Partial<kStats>& x) {
  to[0] = make_float2(x.softmax.max, x.softmax.sum);
  if constexpr (kStats) {
    to[1] = make_float2(x.stats.weighted, x.stats.squares);
    to[2] = make_float2(x.stats.total, x.beats_target);
  }
}

// from the L2: other multiprocessors stored it
template <bool kStats>
__device__ __forceinline__ Partial<kStats> load_partial(const float2* from) {
  const float2 softmax = __ldcg(from);
  if constexpr (kStats) {
    const float2 first = __ldcg(from + 1), second = __ldcg(from + 2);
    return {{softmax.x, softmax.y}, {first.x, first.y, second.x}, second.y};
  } else {
    return {{softmax.x, softmax.y}};
  }
}

template <bool kStats>
__device__ __forceinline__ Partial<kStats> merge_partials(const Partial<kStats>& a,
                                                          const Partial<kStats>& b) {
  const SoftmaxSum<float> softmax = merge(a.softmax, b.softmax);
  if constexpr (kStats) {
    const StatSums<float> stats =
        add_stats(shift_stats(a.stats, a.softmax.sum, a.softmax.max, softmax.max),
                  shift_stats(b.stats, b.softmax.sum, b.softmax.max, softmax.max));
    return {softmax, stats, fmaxf(a.beats_target, b.beats_target)};
  } else {
    return {softmax};
  }
}

template <bool kStats>
__device__ __forceinline__ Partial<kStats> combine_lanes(const Partial<kStats>& x) {
  Partial<kStats> out = {};
  const float max = warp_max(x.softmax.max);
  out.softmax = {max, warp_sum(x.softmax.sum * rescale(x.softmax.max, max))};
  if constexpr (kStats) {
    const StatSums<float> stats = shift_stats(x.stats, x.softmax.sum, x.softmax.max, max);
    out.stats = {warp_sum(stats.weighted), warp_sum(stats.squares), warp_sum(stats.total)};
    out.beats_target = warp_max(x.beats_target);
  }
  return out;
}

}  // namespace dpo_kernels::cuda
