// dlogits[r, :] = c * (onehot(y) - softmax(z_r)) * dz/dx for a row r that scores label y, 0 for any
// other row, with c looked up per sequence, pair or token. Reads a scored row once and writes
// it once, possibly in place; other rows are only written, or left alone. The gradient may be of 16
// bits where the logits are float32.
//
// A warp turns one span and is done. No reduction and no barrier: everything about a row is known
// from forward, so a vector is loaded, turned and stored by one lane. Vectors are aligned for the
// stores; each row's first and last may stick out of it and are then written element by element.
#pragma once

#include "../launchers.h"
#include "fast_math.cuh"
#include "rows.cuh"

namespace dpo_kernels::cuda {

// small blocks: the registers of one are free for the next as soon as its few warps are done
constexpr int kBackwardThreads = 128;
// 72 registers a thread, or 96: as many warps a multiprocessor as forward has
constexpr int backward_blocks_per_multiprocessor(bool softcap) { return softcap ? 5 : 7; }

struct BackwardParams {
  Rows rows;
  const void* logits;
  void* grad_logits;
  int64_t grad_seq_stride;
  int64_t grad_row_stride;
  int vocab;
  int vocab_start;
  int spans;  // of a row, for any alignment of the gradient
  Transform transform;
  float inv_unit;
  float dz_dx;  // where tanh is 0
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
  float target;  // c * (1 - p) * dz/dx
  float others;  // of 2^(a y - b): -c / sum exp(z - max) * dz/dx
  float b;
  float y_max;
};

__device__ __forceinline__ RowGradient row_gradient(const BackwardParams& p, int row) {
  const int token = row + p.rows.shift;
  const int s = sequence_of(p.rows, row);
  const int64_t index = p.grad_index == GradIndex::kToken      ? token
                        : p.grad_index == GradIndex::kSequence ? s
                                                               : s % (p.rows.num_seqs / 2);
  const float c = (p.seq_scale != nullptr ? p.seq_scale[s] : 1.0f) * p.grad[p.grad_stride * index];
  const float row_max = p.row_max[token];
  // near the maximum is enough: what lies between is in kappa
  const float y_max = row_max * p.inv_unit;
  const Reference at = reference_at(p.transform, y_max, row_max);
  return {c * p.dz_dx * one_minus_target(p.logps[token]),
          -c * p.dz_dx * libm::exp(at.kappa - p.log_sum[token]), at.b, y_max};
}

// The gradients with respect to four stored logits. kLabel: the label may be among them, or the
// row's maximum may be too large for its product with transform.exponent.
template <bool kSoftcap, bool kLabel>
__device__ __forceinline__ void turn(const Transform& f, const RowGradient& row, float (&x)[4],
                                     int label_at) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    // not by fours: which elements meet in a vector depends on where the gradient lies
    if (kSoftcap) x[k] = tanh_gap(f, x[k]);
    float d = kSoftcap ? fmaf(x[k], -2.0f * f.exponent, f.exponent - row.b)
                       : fmaf(x[k], f.exponent, -row.b);
    if (kLabel && !kSoftcap && !(fabsf(row.b) < kHuge)) d = (x[k] - row.y_max) * f.exponent;
    float g = row.others * fast_exp2(d);
    if (kLabel && k == label_at) g = row.target;
    // 1 - tanh^2
    x[k] = kSoftcap ? 4.0f * g * fmaf(-x[k], x[k], x[k]) : g;
  }
}

// Words of a gradient of type G for a vector of logits of type E.
template <class E, class G>
constexpr int kGradWords = kPerVector<E> / G::kPerWord;

template <class E, class G>
struct Gradients {
  uint32_t word[kVectorsPerLane][kGradWords<E, G>] = {};
};

template <class E, class G, bool kSoftcap, bool kLabel>
__device__ __forceinline__ void turn_segment(Gradients<E, G>& out,
                                             const Vector (&x)[kVectorsPerLane], const Transform& f,
                                             const RowGradient& row, int label_at) {
#pragma unroll
  for (int v = 0; v < kVectorsPerLane; ++v) {
#pragma unroll
    for (int i = 0; i < kPerVector<E>; i += 4) {
      float group[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        group[k] = E::unpack(x[v].word[(i + k) / E::kPerWord], (i + k) % E::kPerWord);
      }
      turn<kSoftcap, kLabel>(f, row, group, label_at - element_offset<E>(v, 0, 0) - i);
#pragma unroll
      for (int k = 0; k < 4; k += G::kPerWord) {
        out.word[v][(i + k) / G::kPerWord] = G::pack(group[k], group[k + G::kPerWord - 1]);
      }
    }
  }
}

template <class E, class G>
__device__ __forceinline__ void store_gradients(typename G::Bits* row, int first, int vocab,
                                                const uint32_t (&word)[kGradWords<E, G>]) {
  if (first >= 0 && first + kPerVector<E> <= vocab) {
    if constexpr (kGradWords<E, G> == 4) {
      __stcs(reinterpret_cast<uint4*>(row + first), make_uint4(word[0], word[1], word[2], word[3]));
    } else {
      __stcs(reinterpret_cast<uint2*>(row + first), make_uint2(word[0], word[1]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerVector<E>; ++i) {
    const int v = first + i;
    const uint32_t bits = word[i / G::kPerWord] >> (16 * (i % G::kPerWord));
    if (v >= 0 && v < vocab) row[v] = static_cast<typename G::Bits>(bits);
  }
}

template <class E, class G, bool kSoftcap>
__global__ void __launch_bounds__(kBackwardThreads, backward_blocks_per_multiprocessor(kSoftcap))
    backward_kernel(const __grid_constant__ BackwardParams p) {
  const int item = blockIdx.x * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  const int row_index = item / p.spans;
  if (row_index >= p.rows.count) return;
  const int64_t row_label = label_of(p.rows, row_index);
  const bool is_scored = row_label != p.rows.ignore_index;
  if (!is_scored && !p.zero_unscored) return;

  const typename E::Bits* row = static_cast<const typename E::Bits*>(p.logits) +
                                row_offset(p.rows, row_index, p.rows.seq_stride, p.rows.row_stride);
  typename G::Bits* grad_row = static_cast<typename G::Bits*>(p.grad_logits) +
                               row_offset(p.rows, row_index, p.grad_seq_stride, p.grad_row_stride);
  // the first vector begins at the last aligned address up to the row's start
  const int before = misalignment(grad_row, 4 * kGradWords<E, G>) / sizeof(typename G::Bits);
  const unsigned skew = misalignment(row - before);
  // one out of range has left NaN for the whole row
  const int label = column_of(row_label, p.vocab_start, p.vocab);
  const RowGradient gradient = is_scored ? row_gradient(p, row_index) : RowGradient{};
  const bool is_huge = !kSoftcap && !(fabsf(gradient.b) < kHuge);

  const int span_begin = (item - row_index * p.spans) * kSpan<E> - before;
  const int span_end = min(span_begin + kSpan<E>, p.vocab);
#pragma unroll 1
  for (int begin = span_begin; begin < span_end; begin += kSegment<E>) {
    const int first = begin + lane_id() * kPerVector<E>;
    Gradients<E, G> out;
    if (is_scored) {
      Vector x[kVectorsPerLane];
      load_segment<E>(x, row, begin, p.vocab, skew);
      if (is_huge || (begin <= label && label < begin + kSegment<E>)) {
        // a lane without the label has none at a negative place either
        const int at = label < first ? -kSegment<E> : label - first;
        turn_segment<E, G, kSoftcap, true>(out, x, p.transform, gradient, at);
      } else {
        turn_segment<E, G, kSoftcap, false>(out, x, p.transform, gradient, 0);
      }
    }
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
      store_gradients<E, G>(grad_row, first + element_offset<E>(v, 0, 0), p.vocab, out.word[v]);
    }
  }
}

}  // namespace dpo_kernels::cuda
