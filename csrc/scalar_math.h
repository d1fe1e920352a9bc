// The scalar formulas, written once for the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define DPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DPO_HOST_DEVICE inline
#endif

namespace dpo_kernels {

// C's own functions, which nvcc has for the device whatever <math.h> it finds. Those of namespace
// std are not safe there: std::log1p of a float is a host function unless libstdc++'s <math.h>
// was the one included, and a kernel that calls a host function computes garbage.
namespace libm {

DPO_HOST_DEVICE float exp(float x) { return ::expf(x); }
DPO_HOST_DEVICE double exp(double x) { return ::exp(x); }
DPO_HOST_DEVICE float expm1(float x) { return ::expm1f(x); }
DPO_HOST_DEVICE double expm1(double x) { return ::expm1(x); }
DPO_HOST_DEVICE float log(float x) { return ::logf(x); }
DPO_HOST_DEVICE double log(double x) { return ::log(x); }
DPO_HOST_DEVICE float log1p(float x) { return ::log1pf(x); }
DPO_HOST_DEVICE double log1p(double x) { return ::log1p(x); }
DPO_HOST_DEVICE float abs(float x) { return ::fabsf(x); }
DPO_HOST_DEVICE double abs(double x) { return ::fabs(x); }

}  // namespace libm

template <class T>
DPO_HOST_DEVICE T neg_inf() {
  return -static_cast<T>(INFINITY);
}

// exp(from - to) for from <= to; equal maxima, -inf included, need no shift
template <class T>
DPO_HOST_DEVICE T rescale(T from, T to) {
  return from == to ? T(1) : libm::exp(from - to);
}

// The softmax sum over some elements z, kept relative to their own maximum: sum = sum exp(z - max).
// No elements: {-inf, 0}. A NaN or +inf among the elements makes the sum NaN, never the maximum.
template <class T>
struct SoftmaxSum {
  T max = neg_inf<T>();
  T sum = T(0);
};

template <class T>
DPO_HOST_DEVICE SoftmaxSum<T> merge(const SoftmaxSum<T>& a, const SoftmaxSum<T>& b) {
  const T max = a.max > b.max ? a.max : b.max;
  return {max, a.sum * rescale(a.max, max) + b.sum * rescale(b.max, max)};
}

template <class T>
struct TokenResult {
  T logp;
  T row_max;
  T log_sum;
};

// log softmax(z)[target] from the target's z and the sum over all others. The target stays out of
// the sum and the maximum out of the logarithm, so that neither a confident token (log1p) nor a
// large common offset (z - max) loses digits.
template <class T>
DPO_HOST_DEVICE TokenResult<T> token_logp(T target, const SoftmaxSum<T>& others) {
  const T max = target > others.max ? target : others.max;
  const T sum = others.sum * rescale(others.max, max);
  const T gap = target - max;
  if (gap == T(0)) {
    const T log_sum = libm::log1p(sum);
    return {T(0) - log_sum, max, log_sum};
  }
  const T log_sum = libm::log(sum + libm::exp(gap));
  return {gap - log_sum, max, log_sum};
}

// Sums of z are kept this much smaller, so that they cannot overflow where the mean does not: a
// power of two, which changes no digit, for vocabularies of up to 2^24.
constexpr float kTotalScale = 0x1p-24f;

template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();

// What the statistics need beyond SoftmaxSum, over the same elements and relative to the same max.
template <class T>
struct StatSums {
  T weighted = T(0);  // sum (z - max) exp(z - max), with 0 for z = -inf
  T squares = T(0);   // sum exp(2 (z - max))
  T total = T(0);     // sum kTotalScale z
};

// shifts to a maximum `to` >= `from`; sum is the SoftmaxSum's, still relative to `from`
template <class T>
DPO_HOST_DEVICE StatSums<T> shift_stats(const StatSums<T>& a, T sum, T from, T to) {
  const T factor = rescale(from, to);
  if (factor == T(1)) return a;
  if (factor == T(0)) return {sum * T(0), a.squares * T(0), a.total};
  return {factor * (a.weighted + (from - to) * sum), factor * factor * a.squares, a.total};
}

template <class T>
DPO_HOST_DEVICE StatSums<T> add_stats(const StatSums<T>& a, const StatSums<T>& b) {
  return {a.weighted + b.weighted, a.squares + b.squares, a.total + b.total};
}

// The mean of z over `vocab` elements; finite where they are, whichever way the sum was rounded. A
// transform may have taken them beyond the largest number, and then the mean by more than rounding.
template <class T>
DPO_HOST_DEVICE T mean_logit(T total, int64_t vocab) {
  const T mean = total / static_cast<T>(vocab), beyond = libm::abs(mean) / kLargest<T>;
  if (beyond > T(kTotalScale) && beyond < T(1.01f) * T(kTotalScale)) {
    return mean < T(0) ? -kLargest<T> : kLargest<T>;
  }
  return mean / T(kTotalScale);
}

template <class T>
struct RowStats {
  T entropy;  // -sum p log p
  T mean_logits;
  T log_sum_sq_probs;
};

// The statistics of a row of `vocab` elements, from the sums over all but the target and from what
// token_logp made of those.
template <class T>
DPO_HOST_DEVICE RowStats<T> row_stats(T target, const SoftmaxSum<T>& others,
                                      const StatSums<T>& stats, const TokenResult<T>& row,
                                      int64_t vocab) {
  const T gap = target - row.row_max, e = libm::exp(gap);
  // 0, not -inf * 0, for a target without a chance
  const StatSums<T> own = {e == T(0) ? e : gap * e, e * e, T(kTotalScale) * target};
  const StatSums<T> sums = add_stats(shift_stats(stats, others.sum, others.max, row.row_max), own);
  return {row.log_sum - sums.weighted * libm::exp(-row.log_sum), mean_logit(sums.total, vocab),
          libm::log(sums.squares) - T(2) * row.log_sum};
}

// What a shard of the vocabulary gives for a row, see ForwardOutputs: the same of its own columns,
// with the target's z in the place of logp.
template <class T>
DPO_HOST_DEVICE TokenResult<T> shard_result(bool has_target, T target,
                                            const SoftmaxSum<T>& others) {
  const T own = has_target ? target : neg_inf<T>();
  TokenResult<T> row = token_logp(own, others);
  // nothing but -inf, or a NaN that leaves the maximum alone
  if (row.row_max == neg_inf<T>() && own == row.row_max) row.log_sum = others.sum;
  row.logp = has_target ? target : T(0);
  return row;
}

template <class T>
DPO_HOST_DEVICE RowStats<T> shard_stats(bool has_target, T target, const SoftmaxSum<T>& others,
                                        const StatSums<T>& stats, const TokenResult<T>& row,
                                        int64_t vocab) {
  RowStats<T> result = row_stats(has_target ? target : neg_inf<T>(), others, stats, row, vocab);
  if (!has_target) result.mean_logits = mean_logit(stats.total, vocab);
  if (row.row_max == neg_inf<T>()) result.entropy = result.log_sum_sq_probs = row.log_sum;
  return result;
}

// 1 - softmax(z)[target], exact for a confident token
template <class T>
DPO_HOST_DEVICE T one_minus_target(T logp) {
  return -libm::expm1(logp);
}

template <class T>
DPO_HOST_DEVICE T log_sigmoid(T x) {
  return (x < T(0) ? x : T(0)) - libm::log1p(libm::exp(-libm::abs(x)));
}

template <class T>
DPO_HOST_DEVICE T sigmoid(T x) {
  const T e = libm::exp(-libm::abs(x));
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}

template <class T>
struct PairResult {
  T loss;
  T scale;  // d(weight * loss) / d(chosen log-prob), and minus that for the rejected one
};

// DPO's sigmoid loss of logit = beta * margin, margin = chosen log-ratio - rejected log-ratio, with
// cDPO smoothing
template <class T>
DPO_HOST_DEVICE PairResult<T> sigmoid_loss(T margin, T beta, T label_smoothing, T weight) {
  const T logit = beta * margin;
  const T loss = -(T(1) - label_smoothing) * log_sigmoid(logit);
  // without smoothing its term is left out: it is 0 * inf where the rejected answer has no chance
  const T smoothed = label_smoothing == T(0) ? loss : loss - label_smoothing * log_sigmoid(-logit);
  const T derivative =
      label_smoothing * sigmoid(logit) - (T(1) - label_smoothing) * sigmoid(-logit);
  return {smoothed, weight * beta * derivative};
}

}  // namespace dpo_kernels
