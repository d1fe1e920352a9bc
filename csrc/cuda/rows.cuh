// Which rows score a token, and where they lie.
#pragma once

#include "elements.cuh"

namespace dpo_kernels::cuda {

// n / d for 0 <= n < 2^30 and d >= 1, as (n * multiplier) >> shift: with k = ceil(log2 d) the
// multiplier is 2^(30 + k) / d rounded up, too large by less than 1, which costs n / 2^(30 + k) < 1
// / d.
struct Divisor {
  uint32_t multiplier;
  int shift;
};

inline Divisor make_divisor(int64_t d) {
  int log2 = 0;
  while ((int64_t{1} << log2) < d) ++log2;
  const int shift = 30 + log2;
  return {static_cast<uint32_t>(((uint64_t{1} << shift) + d - 1) / d), shift};
}

__device__ __forceinline__ int divide(int n, const Divisor& d) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * d.multiplier >>
                          d.shift);
}

// The rows of the logits, numbered like the tokens. Row r scores token r + shift.
struct Rows {
  const int64_t* labels;
  const int64_t* cu_seqlens;
  int64_t label_seq_stride;
  int64_t label_row_stride;
  int64_t seq_stride;
  int64_t row_stride;
  int64_t ignore_index;
  Divisor by_seq_len;
  int num_seqs;
  int seq_len;
  int count;
  int shift;
};

__device__ __forceinline__ int sequence_start(const Rows& rows, int s) {
  if (rows.cu_seqlens == nullptr) return s * rows.seq_len;
  const int64_t start = rows.cu_seqlens[s];
  return start < 0 ? 0 : start > rows.count ? rows.count : static_cast<int>(start);
}

// -1: packed, and before the first or behind the last sequence
__device__ __forceinline__ int sequence_of(const Rows& rows, int row) {
  if (rows.cu_seqlens == nullptr) return divide(row, rows.by_seq_len);
  int low = 0, high = rows.num_seqs + 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (rows.cu_seqlens[middle] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low == rows.num_seqs + 1 ? -1 : low - 1;
}

__device__ __forceinline__ int64_t token_label(const Rows& rows, int s, int start, int token) {
  if (rows.cu_seqlens != nullptr) return rows.labels[token * rows.label_row_stride];
  return rows.labels[s * rows.label_seq_stride + (token - start) * rows.label_row_stride];
}

// The label that a row scores, ignore_index where it scores none or is not a row. Padded, it is one
// predicated load: many of them can be in flight.
template <bool kPacked>
__device__ __forceinline__ int64_t label_of(const Rows& rows, int row) {
  const bool is_row = row >= 0 && row < rows.count;
  if constexpr (kPacked) {
    const int s = is_row ? sequence_of(rows, row) : -1;
    if (s < 0 || row + rows.shift >= sequence_start(rows, s + 1)) return rows.ignore_index;
    return token_label(rows, s, sequence_start(rows, s), row + rows.shift);
  } else {
    const int s = divide(row, rows.by_seq_len);
    const int t = row - s * rows.seq_len + rows.shift;
    return is_row && t < rows.seq_len
               ? rows.labels[s * rows.label_seq_stride + t * rows.label_row_stride]
               : rows.ignore_index;
  }
}

__device__ __forceinline__ int64_t label_of(const Rows& rows, int row) {
  return rows.cu_seqlens != nullptr ? label_of<true>(rows, row) : label_of<false>(rows, row);
}

// The column of a label in a row of the logits, -1 where another shard has it. Below 2^30, as all
// labels in range are, 32 bits are enough; of others only -1 has no column for certain.
__device__ __forceinline__ int column_of(int64_t label, int vocab_start, int vocab) {
  const uint32_t column = static_cast<uint32_t>(label) - static_cast<uint32_t>(vocab_start);
  return column < static_cast<uint32_t>(vocab) ? static_cast<int>(column) : -1;
}

__device__ __forceinline__ int64_t row_offset(const Rows& rows, int row, int64_t seq_stride,
                                              int64_t row_stride) {
  if (rows.cu_seqlens != nullptr) return row * row_stride;
  const int s = divide(row, rows.by_seq_len);
  return s * seq_stride + (row - s * rows.seq_len) * row_stride;
}

}  // namespace dpo_kernels::cuda
