// The passes over logits that exist once per instruction set, and the choice among them.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../scalar_math.h"

namespace dpo_kernels {

// TransformFactors in the accumulation type
template <class A>
struct Transform {
  A inner;
  A unit;
  bool softcap;
};

// the sums over one piece of a row, relative to that piece's maximum
template <class A>
struct PieceSums {
  SoftmaxSum<A> softmax;
  StatSums<A> stats;
};

// dlogits = factor * softmax(z) * dz/dx
template <class A>
struct RowGradient {
  A row_max;
  A log_sum;
  A factor;
};

template <class T>
struct Passes {
  // stats only when asked for, their total the sum of z itself; the softmax sum has the same bits
  // either way
  PieceSums<Acc<T>> (*sums)(const T* x, int64_t n, const Transform<Acc<T>>& transform, bool stats);
  // out may be x
  void (*gradient)(const T* x, int64_t n, const Transform<Acc<T>>& transform,
                   const RowGradient<Acc<T>>& row, T* out);
};

struct Isa {
  const char* name;
  Passes<float> f32;
  Passes<double> f64;
  Passes<BFloat16> bf16;
  Passes<Float16> f16;
};

inline const Passes<float>& passes_of(const Isa& isa, TypeTag<float>) { return isa.f32; }
inline const Passes<double>& passes_of(const Isa& isa, TypeTag<double>) { return isa.f64; }
inline const Passes<BFloat16>& passes_of(const Isa& isa, TypeTag<BFloat16>) { return isa.bf16; }
inline const Passes<Float16>& passes_of(const Isa& isa, TypeTag<Float16>) { return isa.f16; }

// one translation unit each; the vector ones only on x86-64
const Isa& baseline_isa();
const Isa& avx2_isa();
const Isa& avx512_isa();

const Isa& current_isa();

}  // namespace dpo_kernels
