// AVX2 with FMA and F16C.
#include <type_traits>

#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

// from here to the end of the file; what shared headers define stays baseline code
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace dpo_kernels {
namespace avx2 {

constexpr int kBytes = 32;
constexpr bool kFused = true;
constexpr bool kFloors = false;
constexpr int kVectors = 4;

#include "vectors.inc"

inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
// max and min give b where either is a NaN
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F64 min(F64 a, F64 b) { return {_mm256_min_pd(a.v, b.v)}; }
// a * 2^n, n in the low bits of `biased`; 0 where the result would leave the normal numbers
inline F32 scale_by_power(F32 a, F32 n, F32 biased) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(biased.v), 23);
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(a.v), shifted);
  const __m256 gone = _mm256_cmp_ps(n.v, _mm256_set1_ps(-125.0f), _CMP_LT_OQ);
  return {_mm256_andnot_ps(gone, _mm256_castsi256_ps(scaled))};
}
inline F64 scale_by_power(F64 a, F64 n, F64 biased) {
  const __m256i shifted = _mm256_slli_epi64(_mm256_castpd_si256(biased.v), 52);
  const __m256i scaled = _mm256_add_epi64(_mm256_castpd_si256(a.v), shifted);
  const __m256d gone = _mm256_cmp_pd(n.v, _mm256_set1_pd(-1021.0), _CMP_LT_OQ);
  return {_mm256_andnot_pd(gone, _mm256_castsi256_pd(scaled))};
}

inline Words narrow_to_bfloat16(F32 even, F32 odd) {
  const Words low = round_to_bfloat16(even) >> 16;
  return (Words)_mm256_blend_epi16((__m256i)low, (__m256i)round_to_bfloat16(odd), 0xaa);
}
inline void load_pair(const Float16* p, F32* out) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(p);
  out[0].v = _mm256_cvtph_ps(_mm_loadu_si128(halves));
  out[1].v = _mm256_cvtph_ps(_mm_loadu_si128(halves + 1));
}
inline void store_pair(Float16* p, const F32* in) {
  __m128i* halves = reinterpret_cast<__m128i*>(p);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(halves, _mm256_cvtps_ph(in[0].v, kNearest));
  _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(in[1].v, kNearest));
}

#include "passes.inc"

constexpr Isa kIsa = make_isa("avx2");

}  // namespace avx2

const Isa& avx2_isa() { return avx2::kIsa; }

}  // namespace dpo_kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
