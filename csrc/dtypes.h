// The storage types of logits, and the way from a runtime DType to a template argument.
#pragma once

#include <cstdint>
#include <cstring>

#include "launchers.h"

namespace dpo_kernels {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// what sums of a storage type are kept in
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class T>
struct TypeTag {
  using type = T;
};

// fn(TypeTag<storage type>{})
template <class Fn>
auto dispatch_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kBFloat16:
      return fn(TypeTag<BFloat16>{});
    case DType::kFloat16:
      return fn(TypeTag<Float16>{});
    case DType::kFloat64:
      return fn(TypeTag<double>{});
    default:
      return fn(TypeTag<float>{});
  }
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_acc(float value) { return value; }
inline double to_acc(double value) { return value; }
inline float to_acc(BFloat16 value) { return float_from_bits(uint32_t{value.bits} << 16); }
inline float to_acc(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // the exponents' biases differ by 112; a multiplication moves them and is exact for subnormals
  const uint32_t bits = magnitude >= 0x7c00u
                            ? (magnitude << 13) | 0x7f800000u
                            : bits_of_float(float_from_bits(magnitude << 13) * 0x1p112f);
  return float_from_bits(sign | bits);
}

// to nearest, ties to even; a NaN stays a NaN
template <class T>
T from_acc(Acc<T> value);

template <>
inline float from_acc<float>(float value) {
  return value;
}

template <>
inline double from_acc<double>(double value) {
  return value;
}

template <>
inline BFloat16 from_acc<BFloat16>(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Float16 from_acc<Float16>(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // below the smallest normal half: adding 0.5 lets the float addition round at 2^-24
    half = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace dpo_kernels
