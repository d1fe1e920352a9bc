#include "rows.h"

#include <algorithm>

namespace dpo_kernels {
namespace {

std::vector<int64_t> sequence_bounds(const TokenBatch& batch) {
  std::vector<int64_t> bounds(batch.num_seqs + 1);
  for (int64_t s = 0; s <= batch.num_seqs; ++s) {
    // whatever cu_seqlens holds, the sequences stay inside the batch and apart from one another
    const int64_t least = s == 0 ? 0 : bounds[s - 1];
    bounds[s] = batch.cu_seqlens == nullptr
                    ? s * batch.seq_len
                    : std::min(std::max(batch.cu_seqlens[s], least), batch.seq_len);
  }
  return bounds;
}

}  // namespace

RowList list_rows(const TokenBatch& batch) {
  RowList list;
  list.bounds = sequence_bounds(batch);
  const bool packed = batch.cu_seqlens != nullptr;
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    const int64_t begin = list.bounds[s], end = list.bounds[s + 1];
    const int64_t* labels =
        batch.labels + (packed ? begin * batch.label_row_stride : s * batch.label_seq_stride);
    for (int64_t token = begin + (batch.shift ? 1 : 0); token < end; ++token) {
      const int64_t label = labels[(token - begin) * batch.label_row_stride];
      if (label == batch.ignore_index) continue;
      if (label < 0 || label >= labels_below(batch)) {
        list.bad_token = token;
        return list;
      }
      const int64_t column = label - batch.vocab_start;
      const bool is_here = column >= 0 && column < batch.vocab;
      list.scored.push_back({s, token, is_here ? column : batch.vocab});
    }
  }
  return list;
}

}  // namespace dpo_kernels
