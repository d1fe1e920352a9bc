// bfloat16 on the host: round to nearest even, NaN kept.
#pragma once

#include <cuda_runtime.h>

struct alignas(4) __nv_bfloat162 {
  uint16_t low, high;
};

inline float bf16_to_float(uint16_t x) { return bits_as<float>(uint32_t(x) << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {float_to_bf16(low), float_to_bf16(high)};
}

inline __nv_bfloat162 __hmax2(const __nv_bfloat162& a, const __nv_bfloat162& b) {
  const auto larger = [](uint16_t x, uint16_t y) {
    return float_to_bf16(std::fmax(bf16_to_float(x), bf16_to_float(y)));
  };
  return {larger(a.low, b.low), larger(a.high, b.high)};
}
