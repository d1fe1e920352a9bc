// AVX-512 F, BW, VL and DQ.
#include <type_traits>

#include "isa.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// gcc's own intrinsics start from undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

// from here to the end of the file; what shared headers define stays baseline code
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace dpo_kernels {
namespace avx512 {

constexpr bool kFused = true;

struct F32 {
  using Scalar = float;
  static constexpr int kLanes = 16;
  __m512 v;

  static F32 set(float x) { return {_mm512_set1_ps(x)}; }
};

inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max and min give b where either is a NaN
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 scale_by_power(F32 a, F32 n, F32) { return {_mm512_scalef_ps(a.v, n.v)}; }

struct F64 {
  using Scalar = double;
  static constexpr int kLanes = 8;
  __m512d v;

  static F64 set(double x) { return {_mm512_set1_pd(x)}; }
};

inline F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
inline F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
inline F64 scale_by_power(F64 a, F64 n, F64) { return {_mm512_scalef_pd(a.v, n.v)}; }

inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
inline void store(double* p, F64 a) { _mm512_storeu_pd(p, a.v); }

inline void load_pair(const float* p, F32* out) {
  out[0].v = _mm512_loadu_ps(p);
  out[1].v = _mm512_loadu_ps(p + 16);
}
inline void store_pair(float* p, const F32* in) {
  _mm512_storeu_ps(p, in[0].v);
  _mm512_storeu_ps(p + 16, in[1].v);
}

inline void load_pair(const double* p, F64* out) {
  out[0].v = _mm512_loadu_pd(p);
  out[1].v = _mm512_loadu_pd(p + 8);
}
inline void store_pair(double* p, const F64* in) {
  _mm512_storeu_pd(p, in[0].v);
  _mm512_storeu_pd(p + 8, in[1].v);
}

// even elements, then odd ones
inline void load_pair(const BFloat16* p, F32* out) {
  const __m512i bits = _mm512_loadu_si512(p);
  out[0].v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  out[1].v = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
}
// to nearest even in the upper half. Needs no care for a NaN: those that arise here end in 16
// zeros (see backward.cpp), so that rounding cannot carry out of the mantissa.
inline __m512i round_to_bfloat16(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  return _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
}
inline void store_pair(BFloat16* p, const F32* in) {
  const __m512i even = _mm512_srli_epi32(round_to_bfloat16(in[0]), 16);
  const __m512i odd = round_to_bfloat16(in[1]);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, even, odd));
}

inline void load_pair(const Float16* p, F32* out) {
  const __m256i* halves = reinterpret_cast<const __m256i*>(p);
  out[0].v = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
  out[1].v = _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1));
}
inline void store_pair(Float16* p, const F32* in) {
  __m256i* halves = reinterpret_cast<__m256i*>(p);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(halves, _mm512_cvtps_ph(in[0].v, kNearest));
  _mm256_storeu_si256(halves + 1, _mm512_cvtps_ph(in[1].v, kNearest));
}

#include "sweeps.inc"

constexpr Isa kIsa = make_isa("avx512");

}  // namespace avx512

const Isa& avx512_isa() { return avx512::kIsa; }

}  // namespace dpo_kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
