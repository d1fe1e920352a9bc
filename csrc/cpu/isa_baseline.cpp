// The compiler's own 16-byte vectors: SSE2 on x86-64, and any other architecture.
#include <type_traits>

#include "isa.h"

namespace dpo_kernels {
namespace baseline {

constexpr int kBytes = 16;
constexpr bool kFused = false;
constexpr bool kFloors = false;
constexpr int kVectors = 4;

#include "vectors.inc"

template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}
// max and min give b where either is a NaN
template <class V>
inline V max(V a, V b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class V>
inline V min(V a, V b) {
  return {a.v < b.v ? a.v : b.v};
}
// a * 2^n, n in the low bits of `biased`; 0 where the result would leave the normal numbers
inline F32 scale_by_power(F32 a, F32 n, F32 biased) {
  const Words scaled = (Words)a.v + ((Words)biased.v << 23);
  return {(Floats)(scaled & ~(Words)(n.v < -125.0f))};
}
inline F64 scale_by_power(F64 a, F64 n, F64 biased) {
  const LongWords scaled = (LongWords)a.v + ((LongWords)biased.v << 52);
  return {(Doubles)(scaled & ~(LongWords)(n.v < -1021.0))};
}

inline Words narrow_to_bfloat16(F32 even, F32 odd) {
  return (round_to_bfloat16(even) >> 16) | (round_to_bfloat16(odd) & 0xffff0000u);
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
  const Words bits = load<Words>(p);
  out[0] = widen_float16(bits & 0xffffu);
  out[1] = widen_float16(bits >> 16);
}
inline void store_pair(Float16* p, const F32* in) {
  for (int l = 0; l < F32::kLanes; ++l) {
    p[2 * l] = from_acc<Float16>(in[0].v[l]);
    p[2 * l + 1] = from_acc<Float16>(in[1].v[l]);
  }
}

#include "passes.inc"

constexpr Isa kIsa = make_isa("baseline");

}  // namespace baseline

const Isa& baseline_isa() { return baseline::kIsa; }

}  // namespace dpo_kernels
