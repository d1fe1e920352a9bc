// A span of a row, reduced: every lane over its own elements, then over the lanes of the warp.
#pragma once

#include "fast_math.cuh"
#include "partial.cuh"

namespace dpo_kernels::cuda {

template <class E>
struct RowReader {
  const typename E::Bits* row;
  int vocab;
  int label;      // -1: none that the row has
  uint32_t flip;  // sign bits, where z falls with x
  float target;   // y of the label

  // element i, read once more
  __device__ __forceinline__ float stored(int i) const { return E::unpack(row[i] ^ flip, 0); }
};

// Sums over some elements y of a lane, relative to 2^b with b = f.exponent * max rounded, in units
// of log 2: sum of 2^d, of d 2^d and of 2^2d with d = f.exponent * y - b.
struct ExpSums {
  float sum = 0.0f;
  float weighted = 0.0f;
  float squares = 0.0f;
};

// What a lane has seen of a span.
template <bool kStats>
struct LaneSums {
  float max = neg_inf<float>();
  ExpSums exps;
  float total = 0.0f;  // sum kTotalScale z
  bool beats_target = false;
};

// the same sums relative to a larger maximum: delta = old b - new b
template <bool kStats>
__device__ __forceinline__ ExpSums shifted(const ExpSums& x, float delta) {
  const float factor = fast_exp2(delta);
  if constexpr (!kStats) return {x.sum * factor};
  // a first maximum comes after -inf, and 0 * inf must not arise
  const float step = fmaxf(delta, kVeryLow);
  return {x.sum * factor, fmaf(step, x.sum, x.weighted) * factor, x.squares * (factor * factor)};
}

// the label and what lies beyond the vocabulary become -inf
template <class E>
__device__ __forceinline__ void mask_elements(Vector (&x)[kVectorsPerLane], int begin, int label,
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

template <class E>
__device__ __forceinline__ float lane_max(const Vector (&x)[kVectorsPerLane]) {
  uint32_t words = x[0].word[0];
#pragma unroll
  for (int i = 1; i < kVectorsPerLane * 4; ++i) words = E::max(words, x[i / 4].word[i % 4]);
  float max = E::unpack(words, 0);
  if constexpr (E::kPerWord == 2) max = fmaxf(max, E::unpack(words, 1));
  return max;
}

// The sums of a lane's elements, and in d_total the sum of d. kCareful: elements may be masked or
// -inf, and b = f.exponent * max may be infinite.
template <class E, bool kStats, bool kSoftcap, bool kCareful>
__device__ __forceinline__ ExpSums sum_elements(const Vector (&x)[kVectorsPerLane], int begin,
                                                int label, int vocab, const Transform& f, float max,
                                                float& d_total) {
  const int first = begin + lane_id() * kPerVector<E>;
  const float b = f.exponent * max;
  const float y = max == neg_inf<float>() ? 0.0f : max;
  const bool is_ordinary = fabsf(b) < kHuge;
  // even and odd elements: shorter chains of additions
  float sums[2] = {0.0f, 0.0f};
  ExpSums out;
  d_total = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectorsPerLane * kPerVector<E>; i += 4) {
    float group[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int v = i / kPerVector<E>, w = (i + k) % kPerVector<E> / E::kPerWord;
      group[k] = E::unpack(x[v].word[w], (i + k) % E::kPerWord);
    }
    if constexpr (kSoftcap) tanh_gaps(f, group);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float d = kSoftcap ? fmaf(group[k], -2.0f * f.exponent, f.exponent - b)
                         : fmaf(group[k], f.exponent, -b);
      if constexpr (kCareful) {
        const int v = i / kPerVector<E>, w = (i + k) % kPerVector<E> / E::kPerWord;
        const int at = first + element_offset<E>(v, w, (i + k) % E::kPerWord);
        if (!kSoftcap && !is_ordinary) d = (group[k] - y) * f.exponent;
        if (at >= vocab || at == label) d = neg_inf<float>();
      }
      const float e = fast_exp2(d);
      sums[k % 2] += e;
      if constexpr (kStats) {
        out.weighted = fmaf(kCareful ? fmaxf(d, kVeryLow) : d, e, out.weighted);
        out.squares = fmaf(e, e, out.squares);
        d_total += d;
      }
    }
  }
  out.sum = sums[0] + sums[1];
  return out;
}

// What masked elements and infinite sums spoil: the plain sum of the logits, and which elements
// rank before the target. Of the two segments of a row that have masked ones, and of those with
// extreme logits, read once more in a loop that costs the others nothing.
template <class E, bool kSoftcap>
__device__ __forceinline__ void recount(LaneSums<true>& lane, const RowReader<E>& reader, int begin,
                                        const Transform& f) {
  const int end = min(begin + kSegment<E>, reader.vocab);
#pragma unroll 1
  for (int i = begin + lane_id(); i < end; i += kWarpSize) {
    if (i == reader.label) continue;
    const float y = capped<kSoftcap>(f, reader.stored(i));
    lane.total = fmaf(f.unit * kTotalScale, y, lane.total);
    lane.beats_target |= i < reader.label ? y >= reader.target : y > reader.target;
  }
}

template <class E, bool kStats, bool kSoftcap>
__device__ __forceinline__ void add_segment(LaneSums<kStats>& lane, const RowReader<E>& reader,
                                            int begin, const Transform& f) {
  Vector x[kVectorsPerLane];
  load_segment<E>(x, reader.row, begin, reader.vocab, misalignment(reader.row));
  if (reader.flip != 0) {
#pragma unroll
    for (int i = 0; i < kVectorsPerLane * 4; ++i) x[i / 4].word[i % 4] ^= reader.flip;
  }
  const int end = begin + kSegment<E>;
  const bool is_masked = end > reader.vocab || (begin <= reader.label && reader.label < end);
  if (is_masked) mask_elements<E>(x, begin, reader.label, reader.vocab);

  const float here = capped<kSoftcap>(f, lane_max<E>(x));
  const float max = fmaxf(lane.max, here);
  const float b = f.exponent * max;
  float delta = f.exponent * lane.max - b;
  if (!(fabsf(b) < kHuge)) delta = lane.max == max ? 0.0f : fmaxf(delta, kVeryLow);
  lane.exps = shifted<kStats>(lane.exps, delta);
  lane.max = max;
  float d_total;
  ExpSums sums;
  bool is_careful = is_masked;
  // -inf and products that overflow; tanh has neither, but its -inf is finite and must stay out,
  // and its sum may overflow
  if constexpr (!kSoftcap || kStats) {
    const bool has_huge = !__all_sync(kAllLanes, fabsf(b) < kHuge);
    is_careful = kSoftcap ? is_masked || has_huge : has_huge;
  }
  if (!is_careful) {
    sums = sum_elements<E, kStats, kSoftcap, false>(x, begin, -1, reader.vocab, f, max, d_total);
    // 0 * -inf, from a logit that is -inf
    if constexpr (kStats) is_careful = __any_sync(kAllLanes, sums.weighted != sums.weighted);
  }
  if (is_careful) {
    sums = sum_elements<E, kStats, kSoftcap, true>(x, begin, reader.label, reader.vocab, f, max,
                                                   d_total);
  }
  lane.exps.sum += sums.sum;
  if constexpr (kStats) {
    lane.exps.weighted += sums.weighted;
    lane.exps.squares += sums.squares;
    if (is_masked || is_careful) {
      recount<E, kSoftcap>(lane, reader, begin, f);
    } else {
      constexpr float kElements = kVectorsPerLane * kPerVector<E>;
      lane.total = fmaf(kLn2 * kTotalScale, fmaf(kElements, b, d_total), lane.total);
      lane.beats_target |= begin < reader.label ? here >= reader.target : here > reader.target;
    }
  }
}

// Span j of a row over the whole warp, relative to its maximum z; all lanes return the same.
template <class E, bool kStats, bool kSoftcap>
__device__ __forceinline__ Partial<kStats> reduce_span(const RowReader<E>& reader, int j,
                                                       const Transform& f) {
  LaneSums<kStats> lane;
  const int end = min((j + 1) * kSpan<E>, reader.vocab);
#pragma unroll 1
  for (int begin = j * kSpan<E>; begin < end; begin += kSegment<E>) {
    add_segment<E, kStats, kSoftcap>(lane, reader, begin, f);
  }
  const float max = warp_max(lane.max);
  const float z = f.unit * max;
  const Reference at = reference_at(f, max, z);
  const float delta = lane.max == max ? 0.0f : fmaxf(f.exponent * lane.max - at.b, kVeryLow);
  const ExpSums sums = shifted<kStats>(lane.exps, delta);
  const float factor = fast_exp2(at.kappa * kLog2E);
  Partial<kStats> out = {};
  const float sum = warp_sum(sums.sum);
  out.softmax = {z, sum * factor};
  if constexpr (kStats) {
    const float weighted = fmaf(kLn2, warp_sum(sums.weighted), at.kappa * sum);
    out.stats = {weighted * factor, warp_sum(sums.squares) * (factor * factor),
                 warp_sum(lane.total)};
    out.beats_target = __any_sync(kAllLanes, lane.beats_target) ? 1.0f : 0.0f;
  }
  return out;
}

}  // namespace dpo_kernels::cuda
