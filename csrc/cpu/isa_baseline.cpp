// The compiler's own 16-byte vectors: SSE2 on x86-64, and any other architecture.
#include <type_traits>

#include "isa.h"

namespace dpo_kernels {
namespace baseline {

constexpr bool kFused = false;

using Floats = float __attribute__((vector_size(16)));
using Doubles = double __attribute__((vector_size(16)));
using Ints32 = int32_t __attribute__((vector_size(16)));
using Ints64 = int64_t __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
using LongWords = uint64_t __attribute__((vector_size(16)));

struct F32 {
  using Scalar = float;
  static constexpr int kLanes = 4;
  Floats v;

  static F32 set(float x) { return {Floats{x, x, x, x}}; }
};

struct F64 {
  using Scalar = double;
  static constexpr int kLanes = 2;
  Doubles v;

  static F64 set(double x) { return {Doubles{x, x}}; }
};

inline F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
inline F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
inline F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
inline F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
// max and min give b where either is a NaN
inline F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
inline F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
// a * 2^n; 0 where the result would leave the normal numbers
inline F32 scale_by_power(F32 a, F32 n, F32 biased) {
  const Words scaled = (Words)a.v + ((Words)biased.v << 23);
  const Ints32 gone = n.v < -125.0f;
  return {(Floats)(scaled & ~(Words)gone)};
}

inline F64 operator+(F64 a, F64 b) { return {a.v + b.v}; }
inline F64 operator-(F64 a, F64 b) { return {a.v - b.v}; }
inline F64 operator*(F64 a, F64 b) { return {a.v * b.v}; }
inline F64 operator/(F64 a, F64 b) { return {a.v / b.v}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {a.v * b.v + c.v}; }
inline F64 max(F64 a, F64 b) { return {a.v > b.v ? a.v : b.v}; }
inline F64 min(F64 a, F64 b) { return {a.v < b.v ? a.v : b.v}; }
inline F64 scale_by_power(F64 a, F64 n, F64 biased) {
  const LongWords scaled = (LongWords)a.v + ((LongWords)biased.v << 52);
  const Ints64 gone = n.v < -1021.0;
  return {(Doubles)(scaled & ~(LongWords)gone)};
}

template <class P, class V>
inline void store(P* p, V a) {
  __builtin_memcpy(p, &a.v, sizeof a.v);
}

inline void load_pair(const float* p, F32* out) { __builtin_memcpy(out, p, 2 * sizeof *out); }
inline void store_pair(float* p, const F32* in) { __builtin_memcpy(p, in, 2 * sizeof *in); }
inline void load_pair(const double* p, F64* out) { __builtin_memcpy(out, p, 2 * sizeof *out); }
inline void store_pair(double* p, const F64* in) { __builtin_memcpy(p, in, 2 * sizeof *in); }

// the 16-bit types: even elements, then odd ones
template <class T>
inline Words load_words(const T* p) {
  Words bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}
template <class T>
inline void store_words(T* p, Words even, Words odd) {
  const Words bits = (even & 0xffffu) | (odd << 16);
  __builtin_memcpy(p, &bits, sizeof bits);
}

inline void load_pair(const BFloat16* p, F32* out) {
  const Words bits = load_words(p);
  out[0].v = (Floats)(bits << 16);
  out[1].v = (Floats)(bits & 0xffff0000u);
}
// to nearest even. Needs no care for a NaN: those that arise here end in 16 zeros (see
// backward.cpp), so that rounding cannot carry out of the mantissa.
inline Words round_to_bfloat16(F32 a) {
  const Words bits = (Words)a.v;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline void store_pair(BFloat16* p, const F32* in) {
  store_words(p, round_to_bfloat16(in[0]), round_to_bfloat16(in[1]));
}

// see to_acc(Float16)
inline F32 widen_float16(Words bits) {
  const Words magnitude = bits & 0x7fffu;
  const Words finite = (Words)((Floats)(magnitude << 13) * 0x1p112f);
  const Words special = (magnitude << 13) | 0x7f800000u;
  const Words is_special = (Words)(magnitude >= 0x7c00u);
  const Words value = (is_special & special) | (~is_special & finite);
  return {(Floats)(value | ((bits & 0x8000u) << 16))};
}
inline void load_pair(const Float16* p, F32* out) {
  const Words bits = load_words(p);
  out[0] = widen_float16(bits & 0xffffu);
  out[1] = widen_float16(bits >> 16);
}
inline Words narrow_to_float16(F32 a) {
  Words bits = {};
  for (int l = 0; l < F32::kLanes; ++l) bits[l] = from_acc<Float16>(a.v[l]).bits;
  return bits;
}
inline void store_pair(Float16* p, const F32* in) {
  store_words(p, narrow_to_float16(in[0]), narrow_to_float16(in[1]));
}

#include "sweeps.inc"

constexpr Isa kIsa = make_isa("baseline");

}  // namespace baseline

const Isa& baseline_isa() { return baseline::kIsa; }

}  // namespace dpo_kernels
