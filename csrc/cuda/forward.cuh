// Per scored row r with label y, in one read of the logits:
//   logp = z_y - max z - log sum exp(z - max z)
// and, on request, the entropy, the mean logit, log sum p^2 and whether y is the first maximum. The
// block that finishes last turns them into sequence sums and the pair loss (epilogue.cuh).
//
// A warp reduces a segment of a row (elements.cuh) in registers: loads, maximum, one exponential an
// element, sums. The target is left out of all of them (scalar_math.h, token_logp). The segments of
// a row meet in the workspace, whether one warp reduced them or several that share the row: the
// last to arrive goes through all of them, segment j on lane j mod 32 in ascending order, then over
// the lanes. So the bits of a row's results depend on nothing but the row.
#pragma once

#include "epilogue.cuh"
#include "rows.cuh"

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

struct ForwardParams {
  Rows rows;
  const void* logits;
  int vocab;
  int segments;  // of a row
  Transform transform;
  bool negate;  // z falls with x: x is read with its sign flipped
  float* logps;
  float* row_max;
  float* log_sum;
  float* entropy;
  float* mean_logits;
  float* log_sum_sq_probs;
  uint8_t* is_top1;
  SequenceOutputs sequences;
  int* arrivals;     // [slots], of the rows that warps share
  float2* partials;  // [slots, segments, kPartialWords]
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

// the label and what lies beyond the vocabulary become -inf
template <class E>
__device__ __forceinline__ void make_holes(Vector (&x)[kVectorsPerLane], int begin, int label,
                                           int vocab) {
  const int first = begin + lane_id() * kPerVector<E>;
#pragma unroll
  for (int i = 0; i < kVectorsPerLane * 4; ++i) {
#pragma unroll
    for (int h = 0; h < E::kPerWord; ++h) {
      const int at = element_offset<E>(i / 4, i % 4, h);
      if (at >= vocab - first || at == label - first) {
        x[i / 4].word[i % 4] = without<E>(x[i / 4].word[i % 4], h);
      }
    }
  }
}

// One segment, reduced over the warp: every lane returns the same. -inf adds nothing to a sum of
// exponentials, so that holes need no more care, unless tanh makes it finite: that is kHoles.
template <class E, bool kStats, bool kSoftcap, bool kHoles>
__device__ __forceinline__ Partial<kStats> reduce_segment(const Vector (&x)[kVectorsPerLane],
                                                          int begin, int label, int vocab,
                                                          const Transform& f) {
  const int first = begin + lane_id() * kPerVector<E>;
  uint32_t words = x[0].word[0];
#pragma unroll
  for (int i = 1; i < kVectorsPerLane * 4; ++i) words = E::max(words, x[i / 4].word[i % 4]);
  float max = neg_inf<float>();
#pragma unroll
  for (int h = 0; h < E::kPerWord; ++h) max = fmaxf(max, E::unpack(words, h));
  max = f.out * inner<kSoftcap>(f, warp_max(max));
  // nothing but -inf: exp(-inf - 0) keeps the sum at 0
  const float shift = max == neg_inf<float>() ? 0.0f : max;

  // even and odd elements: shorter chains of additions
  float sums[2] = {0.0f, 0.0f};
  StatSums<float> stats;
#pragma unroll
  for (int i = 0; i < kVectorsPerLane * kPerVector<E>; ++i) {
    const int v = i / kPerVector<E>, w = i % kPerVector<E> / E::kPerWord, h = i % E::kPerWord;
    const int at = first + element_offset<E>(v, w, h);
    float d = fmaf(inner<kSoftcap>(f, E::unpack(x[v].word[w], h)), f.out, -shift);
    if (kHoles && (at >= vocab || at == label)) d = neg_inf<float>();
    const float e = fast_exp2(d * kLog2E);
    sums[i % 2] += e;
    if constexpr (kStats) {
      stats.weighted = fmaf(fmaxf(d, -1e30f), e, stats.weighted);
      stats.squares = fmaf(e, e, stats.squares);
      stats.total += d;
    }
  }

  Partial<kStats> out = {};
  out.softmax = {max, warp_sum(sums[0] + sums[1])};
  if constexpr (kStats) {
    out.stats = {warp_sum(stats.weighted), warp_sum(stats.squares),
                 warp_sum(stats.total) + static_cast<float>(kSegment<E>) * shift};
  }
  return out;
}

// What holes spoil: the plain sum of the logits, and which elements rank before the target. Of the
// two segments of a row with holes, read once more in a loop that costs the others no registers.
template <class E, bool kSoftcap>
__device__ __forceinline__ void recount(Partial<true>& segment, const typename E::Bits* row,
                                        uint32_t flip, int begin, int label, int vocab,
                                        const Transform& f, float target) {
  const int end = min(begin + kSegment<E>, vocab);
  float total = 0.0f;
  bool beats_target = false;
#pragma unroll 1
  for (int i = begin + lane_id(); i < end; i += kWarpSize) {
    if (i == label) continue;
    const float z = f.out * inner<kSoftcap>(f, E::unpack(row[i] ^ flip, 0));
    total += z;
    beats_target |= i < label ? z >= target : z > target;
  }
  segment.stats.total = warp_sum(total);
  segment.beats_target = __ballot_sync(kAllLanes, beats_target) != 0 ? 1.0f : 0.0f;
}

// everything that is wanted of a scored row, from all of its elements but the label's
template <bool kStats>
__device__ __forceinline__ void finish_row(const ForwardParams& p, int token, float target,
                                           const Partial<kStats>& lanes) {
  const Partial<kStats> others = combine_lanes(lanes);
  if (lane_id() != 0) return;
  const TokenResult<float> result = token_logp(target, others.softmax);
  p.logps[token] = result.logp;
  if (p.row_max != nullptr) p.row_max[token] = result.row_max;
  if (p.log_sum != nullptr) p.log_sum[token] = result.log_sum;
  if constexpr (kStats) {
    StatSums<float> stats =
        shift_stats(others.stats, others.softmax.sum, others.softmax.max, result.row_max);
    const float d = target - result.row_max;
    const float e = libm::exp(d);
    stats = add_stats(stats, {fmaxf(d, -1e30f) * e, e * e, target});
    p.entropy[token] = entropy(stats.weighted, result.log_sum);
    p.mean_logits[token] = stats.total / static_cast<float>(p.vocab);
    p.log_sum_sq_probs[token] = log_sum_sq_probs(stats.squares, result.log_sum);
    p.is_top1[token] = others.beats_target == 0.0f && others.softmax.sum == others.softmax.sum;
  }
}

// the outputs of the tokens that no row scores
template <bool kStats>
__device__ __forceinline__ void clear_unscored(const ForwardParams& p) {
  const int threads = gridDim.x * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.rows.count; i += threads) {
    const int token = static_cast<int>(i);
    if (label_of(p.rows, token - p.rows.shift) != p.rows.ignore_index) continue;
    p.logps[token] = 0.0f;
    if (p.row_max != nullptr) p.row_max[token] = 0.0f;
    if (p.log_sum != nullptr) p.log_sum[token] = 0.0f;
    if constexpr (kStats) {
      p.entropy[token] = 0.0f;
      p.mean_logits[token] = 0.0f;
      p.log_sum_sq_probs[token] = 0.0f;
      p.is_top1[token] = 0;
    }
  }
}

template <class E, bool kStats, bool kSoftcap>
__device__ __forceinline__ void forward_part(const ForwardParams& p, const Part& part) {
  const typename E::Bits* row = static_cast<const typename E::Bits*>(p.logits) +
                                row_offset(p.rows, part.row, p.rows.seq_stride, p.rows.row_stride);
  const unsigned skew = misalignment(row);
  const int lane = lane_id();
  const uint32_t flip = p.negate ? E::kSigns : 0;

  // a label that the row does not have makes every result of the row NaN
  const bool is_label = part.label >= 0 && part.label < p.vocab;
  const int label = is_label ? static_cast<int>(part.label) : -1;
  const float target =
      is_label ? p.transform.out * inner<kSoftcap>(p.transform, E::unpack(row[label] ^ flip, 0))
               : NAN;

  float2* const partials = p.partials + int64_t(part.slot) * p.segments * kPartialWords<kStats>;
  for (int j = part.begin; j < part.end; ++j) {
    const int begin = j * kSegment<E>;
    Vector x[kVectorsPerLane];
    load_segment<E>(x, row, begin, p.vocab, skew);
    if (flip != 0) {
#pragma unroll
      for (int i = 0; i < kVectorsPerLane * 4; ++i) x[i / 4].word[i % 4] ^= flip;
    }
    const bool holes =
        begin + kSegment<E> > p.vocab || (begin <= label && label < begin + kSegment<E>);
    if (holes) make_holes<E>(x, begin, label, p.vocab);
    Partial<kStats> segment =
        holes && kSoftcap
            ? reduce_segment<E, kStats, kSoftcap, true>(x, begin, label, p.vocab, p.transform)
            : reduce_segment<E, kStats, kSoftcap, false>(x, begin, label, p.vocab, p.transform);
    if constexpr (kStats) {
      const float max = segment.softmax.max;
      segment.beats_target = (begin < label ? max >= target : max > target) ? 1.0f : 0.0f;
      if (holes) {
        recount<E, kSoftcap>(segment, row, flip, begin, label, p.vocab, p.transform, target);
      }
    }
    if (lane == 0) store_partial(partials + j * kPartialWords<kStats>, segment);
  }

  const int segments = part.end - part.begin;
  if (segments < p.segments) {
    int arrived = 0;
    if (lane == 0) {
      int* const counter = p.arrivals + part.slot;
      // this warp's segments, all stored by this lane, before its arrival is seen
      __threadfence();
      arrived = atomicAdd(counter, segments) + segments;
      // no segment of another warp is loaded before all have arrived
      __threadfence();
    }
    if (__shfl_sync(kAllLanes, arrived, 0) != p.segments) return;
  }
  // what lane 0 has stored, and has seen of the other warps, for all lanes
  __syncwarp();
  Partial<kStats> mine = {};
  for (int base = 0; base < p.segments; base += kWarpSize) {
    const int j = base + lane;
    if (j < p.segments) {
      mine = merge_partials(mine, load_partial<kStats>(partials + j * kPartialWords<kStats>));
    }
  }
  // the warp's next row overwrites them
  __syncwarp();
  finish_row(p, part.row + p.rows.shift, target, mine);
}

template <class E, bool kStats, bool kSoftcap>
__global__ void __launch_bounds__(threads_of(kStats, kSoftcap), 1)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  clear_unscored<kStats>(p);
  visit_share(p.rows, 1, 0, p.segments,
              [&](const Part& part) { forward_part<E, kStats, kSoftcap>(p, part); });
  if (p.sequences.logps != nullptr || p.sequences.loss != nullptr) {
    finish_sequences(p.rows, p.logps, p.sequences);
  }
}

}  // namespace dpo_kernels::cuda
