// Exponentials and tanh by the special function unit, and how far they are from exact.
//
// The kernels work on y = x, or y = tanh(inner * x) with a softcap; z = unit * y are the logits
// whose softmax is taken. With a = unit * log2(e), an exponential is one FMA and one ex2:
//   exp(z - z') = 2^(a y - b),   b = a y' rounded,
// where y' is a maximum. The FMA does not round the product, so that a large common offset costs
// nothing: b's own rounding multiplies all terms by one factor, which Reference takes out again.
//
// What is left: the FMA rounds once and a is rounded, so a term's exponent is wrong by at most
// |d| * 2^-23 with d = z - z', and ex2 adds 2 ulp: a relative error of |d| * 2^-23 + 2^-22. A term
// weighs exp(d) in a sum that is at least 1, so log sum exp is wrong by at most
// 2^-22 + 2^-23 * (mean of |d| under the softmax, itself at most log V). torch's own float32
// log_softmax rounds a result of that size, |logp|, to 2^-24 |logp|.
#pragma once

#include "elements.cuh"

namespace dpo_kernels::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// 2^24: exponents beyond it are not formed as differences of products, whose rounding would be more
// than an exponential can hold
constexpr float kHuge = 16777216.0f;
// stands for -inf where it is multiplied by a 0
constexpr float kVeryLow = -1e30f;

struct Transform {
  float unit;
  float exponent;       // unit * log2(e)
  float tanh_exponent;  // 2 * inner * log2(e)
};

// 2^x, 2 ulp, results below 2^-126 flushed to 0
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// 1 / x, 1 ulp
__device__ __forceinline__ float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// unlike fminf, NaN when x is
__device__ __forceinline__ float min_or_nan(float x, float bound) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(bound));
  return result;
#else
  return x > bound ? bound : x;
#endif
}

// 1 + exp(2 inner x). The bound keeps the product of four finite; tanh is 1 in float long before.
__device__ __forceinline__ float one_plus_exp(const Transform& f, float x) {
  return 1.0f + fast_exp2(min_or_nan(f.tanh_exponent * x, 30.0f));
}

// q = 1 / (1 + exp(2 inner x)): tanh(inner x) = 1 - 2 q
__device__ __forceinline__ float tanh_gap(const Transform& f, float x) {
  return fast_reciprocal(one_plus_exp(f, x));
}

// The same for four elements by one reciprocal: 2.25 operations of the special function unit an
// element, the softmax's own ex2 included, not 3. ex2 (2 ulp, weighed by q (1 - q) <= 1/4), the
// addition, the reciprocal and three products leave q wrong by at most 6 * 2^-24 q, and
// z = cap * tanh by at most cap * 2^-20.4, for z > 0 half of that: 1e-5 nats at a cap of 30, where
// float32 itself has a spacing of 2e-6. tanh.approx would be 1000 times worse.
__device__ __forceinline__ void tanh_gaps(const Transform& f, float (&x)[4]) {
  float w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = one_plus_exp(f, x[i]);
  const float first = w[0] * w[1], second = w[2] * w[3];
  const float all = fast_reciprocal(first * second);
  const float of_first = all * second, of_second = all * first;
  x[0] = of_first * w[1];
  x[1] = of_first * w[0];
  x[2] = of_second * w[3];
  x[3] = of_second * w[2];
}

// y of a single element
template <bool kSoftcap>
__device__ __forceinline__ float capped(const Transform& f, float x) {
  return kSoftcap ? fmaf(-2.0f, tanh_gap(f, x), 1.0f) : x;
}

// What sums of 2^(a y - b) with b = a y' rounded must be multiplied by to be sums of exp(z - z'),
// z' = unit * y' rounded: exp(kappa). Both roundings are exact here, being those of a product.
struct Reference {
  float b;
  float kappa;
};

__device__ __forceinline__ Reference reference_at(const Transform& f, float y, float z) {
  const float b = f.exponent * y;
  const bool is_ordinary = fabsf(b) < kHuge;
  return {b, is_ordinary ? fmaf(f.unit, y, -z) - kLn2 * fmaf(f.exponent, y, -b) : 0.0f};
}

}  // namespace dpo_kernels::cuda
