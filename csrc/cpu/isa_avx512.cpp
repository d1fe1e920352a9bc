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

constexpr int kBytes = 64;
constexpr bool kFused = true;
constexpr bool kFloors = true;
constexpr int kVectors = 8;

#include "vectors.inc"

inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
// max and min give b where either is a NaN
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
inline F32 scale_by_power(F32 a, F32 n, F32) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline F64 scale_by_power(F64 a, F64 n, F64) { return {_mm512_scalef_pd(a.v, n.v)}; }

// t and its fraction above the floor: 0 for -inf
struct FlooredOctaves {
  F32 t;
  F32 r;
};
inline FlooredOctaves floor_octaves(F32 t) {
  return {t, {_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}};
}
// t = x log2(e). Its rounding costs e^x as much as the rounding of x, 2^-24 |x| at most; to take it
// back would be two more instructions.
inline FlooredOctaves split_octaves(F32 x) { return floor_octaves(x * F32::set(kLog2E)); }
// a * 2^floor(t)
inline F32 raise_octaves(F32 a, const FlooredOctaves& split) {
  return {_mm512_scalef_ps(a.v, split.t.v)};
}

inline __m512i round_by_mask(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  return _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
}
// round_to_bfloat16 in one instruction less
inline Words narrow_to_bfloat16(F32 even, F32 odd) {
  const __m512i low = _mm512_srli_epi32(round_by_mask(even), 16);
  return (Words)_mm512_mask_blend_epi16(0xaaaaaaaa, low, round_by_mask(odd));
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

#include "passes.inc"

constexpr Isa kIsa = make_isa("avx512");

}  // namespace avx512

const Isa& avx512_isa() { return avx512::kIsa; }

}  // namespace dpo_kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
