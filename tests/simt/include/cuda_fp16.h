// float16 on the host, by the compiler's _Float16.
#pragma once

#include <cuda_runtime.h>

struct alignas(4) __half2 {
  _Float16 low, high;
};

inline float __low2float(const __half2& x) { return x.low; }
inline float __high2float(const __half2& x) { return x.high; }

inline __half2 __floats2half2_rn(float low, float high) {
  return {static_cast<_Float16>(low), static_cast<_Float16>(high)};
}

inline __half2 __hmax2(const __half2& a, const __half2& b) {
  return {static_cast<_Float16>(std::fmax(float(a.low), float(b.low))),
          static_cast<_Float16>(std::fmax(float(a.high), float(b.high)))};
}
