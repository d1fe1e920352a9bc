// dlogits[r, :] = c * (onehot(y) - softmax(z_r)) * dz/dx for a row r that scores label y, 0 for any
// other row, with c looked up per sequence, pair or token. Reads a scored row once and writes
// it once, possibly in place; other rows are only written, or left alone.
//
// No reduction and no barrier: everything about a row is known from forward, so a vector is loaded,
// turned and stored by one lane. Vectors are aligned for the stores; each row's first and last may
// stick out of it and are then written element by element.
#pragma once

#include "../launchers.h"
#include "rows.cuh"

namespace dpo_kernels::cuda {

struct BackwardParams {
  Rows rows;
  const void* logits;
  void* grad_logits;
  int64_t grad_seq_stride;
  int64_t grad_row_stride;
  int vocab;
  int segments;  // of a row, for any alignment of the gradient
  Transform transform;
  float slope;  // dz/dx where tanh is 0
  const float* logps;
  const float* row_max;
  const float* log_sum;
  const float* seq_scale;
  const float* grad;
  int64_t grad_stride;
  GradIndex grad_index;
  bool zero_unscored;
};

// what a scored row multiplies its exponentials by, and how
struct RowGradient {
  float target;  // c * (1 - p) * slope
  float others;  // -c / sum exp(z - max) * slope
  float row_max;
};

__device__ __forceinline__ RowGradient row_gradient(const BackwardParams& p, int row) {
  const int token = row + p.rows.shift;
  const int s = sequence_of(p.rows, row);
  const int64_t index = p.grad_index == GradIndex::kToken      ? token
                        : p.grad_index == GradIndex::kSequence ? s
                                                               : s % (p.rows.num_seqs / 2);
  const float c = (p.seq_scale != nullptr ? p.seq_scale[s] : 1.0f) * p.grad[p.grad_stride * index];
  return {c * p.slope * one_minus_target(p.logps[token]),
          -c * p.slope * libm::exp(-p.log_sum[token]), p.row_max[token]};
}

// the gradient with respect to a stored logit x
template <bool kSoftcap>
__device__ __forceinline__ float element_gradient(const Transform& f, const RowGradient& row,
                                                  float x, bool is_label) {
  const float y = inner<kSoftcap>(f, x);
  const float d = fmaf(y, f.out, -row.row_max);
  const float g = is_label ? row.target : row.others * fast_exp2(d * kLog2E);
  return kSoftcap ? g * (1.0f - y * y) : g;
}

template <class E>
__device__ __forceinline__ void store_vector(typename E::Bits* row, int first, int vocab,
                                             const Vector& x, bool inside) {
  if (inside || (first >= 0 && first + kPerVector<E> <= vocab)) {
    store_streaming(row + first, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerVector<E>; ++i) {
    const int v = first + i;
    const uint32_t bits = x.word[i / E::kPerWord] >> (16 * (i % E::kPerWord));
    if (v >= 0 && v < vocab) row[v] = static_cast<typename E::Bits>(bits);
  }
}

template <class E, bool kSoftcap>
__device__ __forceinline__ void backward_part(const BackwardParams& p, const Part& part) {
  const typename E::Bits* row = static_cast<const typename E::Bits*>(p.logits) +
                                row_offset(p.rows, part.row, p.rows.seq_stride, p.rows.row_stride);
  typename E::Bits* grad_row = static_cast<typename E::Bits*>(p.grad_logits) +
                               row_offset(p.rows, part.row, p.grad_seq_stride, p.grad_row_stride);
  // the first vector begins at the last aligned address up to the row's start
  const int before = misalignment(grad_row) / sizeof(typename E::Bits);
  const unsigned skew = misalignment(row - before);
  const bool is_label = part.label >= 0 && part.label < p.vocab;
  const int label = is_label ? static_cast<int>(part.label) : -kSegment<E>;
  const RowGradient gradient = part.scored ? row_gradient(p, part.row) : RowGradient{};

  for (int j = part.begin; j < part.end; ++j) {
    const int begin = j * kSegment<E> - before;
    const int first = begin + lane_id() * kPerVector<E>;
    const int label_at = label - first;
    const bool inside = begin >= 0 && begin + kSegment<E> <= p.vocab;
    Vector x[kVectorsPerLane] = {};
    if (part.scored) {
      load_segment<E>(x, row, begin, p.vocab, skew);
#pragma unroll
      for (int v = 0; v < kVectorsPerLane; ++v) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float g[2] = {};
#pragma unroll
          for (int h = 0; h < E::kPerWord; ++h) {
            g[h] = element_gradient<kSoftcap>(p.transform, gradient, E::unpack(x[v].word[w], h),
                                              element_offset<E>(v, w, h) == label_at);
          }
          x[v].word[w] = E::pack(g[0], g[1]);
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
      store_vector<E>(grad_row, first + element_offset<E>(v, 0, 0), p.vocab, x[v], inside);
    }
  }
}

template <class E, bool kSoftcap>
__global__ void __launch_bounds__(threads_of(false, kSoftcap), 1)
    backward_kernel(const __grid_constant__ BackwardParams p) {
  // a scored segment moves twice the bytes of one that is only zeroed
  visit_share(p.rows, p.zero_unscored ? 2 : 1, p.zero_unscored ? 1 : 0, p.segments,
              [&](const Part& part) { backward_part<E, kSoftcap>(p, part); });
}

}  // namespace dpo_kernels::cuda
