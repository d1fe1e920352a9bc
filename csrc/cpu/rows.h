// Which rows of a batch are scored, and where they lie.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../launchers.h"
#include "isa.h"

namespace dpo_kernels {

// Rows are numbered like tokens. A shifted token is scored by the row before its own.
struct ScoredRow {
  int64_t seq;
  int64_t token;
  int64_t label;  // its column of the logits; vocab where it is on another shard
};

struct RowList {
  std::vector<int64_t> bounds;    // [num_seqs + 1]: sequence s is tokens bounds[s] .. bounds[s + 1]
  std::vector<ScoredRow> scored;  // ascending
  int64_t bad_token = -1;         // the first scored one whose label is out of range
};

RowList list_rows(const TokenBatch& batch);

// in elements, with the strides of the logits or of their gradient
inline int64_t row_offset(const TokenBatch& batch, int64_t row, int64_t seq_stride,
                          int64_t row_stride) {
  if (batch.cu_seqlens != nullptr) return row * row_stride;
  return row / batch.seq_len * seq_stride + row % batch.seq_len * row_stride;
}

template <class T>
const T* logits_row(const TokenBatch& batch, const ScoredRow& scored) {
  const int64_t row = scored.token - (batch.shift ? 1 : 0);
  return static_cast<const T*>(batch.logits) +
         row_offset(batch, row, batch.seq_stride, batch.row_stride);
}

template <class A>
Transform<A> make_transform(const LogitTransform& t) {
  const auto [inner, unit] = factors(t);
  return {static_cast<A>(inner), static_cast<A>(unit), t.softcap != 0};
}

// below this many elements a pass ends sooner than another thread wakes up
constexpr int64_t kElementsWorthAThread = 1 << 16;

inline int useful_threads(int64_t rows, int64_t vocab, int threads) {
  return rows * vocab < 2 * kElementsWorthAThread ? 1 : threads;
}

}  // namespace dpo_kernels
