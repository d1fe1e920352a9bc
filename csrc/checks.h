// What must hold of the structs of launchers.h before a pointer in them is followed. Lengths behind
// the pointers cannot be seen from here: whoever makes the structs answers for those. A batch is
// looked at once, by who makes it; the launchers look at what comes with it.
#pragma once

#include <stdexcept>
#include <string>

#include "launchers.h"

namespace dpo_kernels {

inline void require(bool holds, const char* name, const char* expected) {
  if (!holds) throw std::invalid_argument(std::string(name) + ": expected " + expected);
}

// a tensor without elements has no address
inline void require_address(const void* address, int64_t size, const char* name) {
  require(address != nullptr || size == 0, name, "an address, got a null pointer");
}

inline void check(const TokenBatch& batch) {
  require(batch.dtype >= DType::kFloat32 && batch.dtype <= DType::kFloat64, "dtype", "0 to 3");
  require(batch.vocab >= 0, "vocab", "a size, got a negative number");
  require(batch.num_seqs >= 0, "num_seqs", "a size, got a negative number");
  require(batch.seq_len >= 0, "seq_len", "a size, got a negative number");
  require(batch.seq_stride >= 0 && batch.row_stride >= 0, "logits strides", "none below 0");
  require(batch.label_seq_stride >= 0 && batch.label_row_stride >= 0, "label strides",
          "none below 0");
  int64_t elements;
  require(batch.cu_seqlens != nullptr ||
              !__builtin_mul_overflow(batch.num_seqs, batch.seq_len, &elements),
          "num_seqs * seq_len", "a number of 64 bits");
  const int64_t tokens = num_tokens(batch);
  require(!__builtin_mul_overflow(tokens, batch.vocab, &elements), "tokens * vocab",
          "a number of 64 bits");
  require_address(batch.logits, elements, "logits");
  require_address(batch.labels, tokens, "labels");
  require(batch.vocab_total >= 0, "vocab_total", "a size, got a negative number");
  const int64_t beside = batch.vocab_total == 0 ? 0 : batch.vocab_total - batch.vocab;
  require(beside >= 0, "vocab_total", "no less than vocab, or 0");
  require(batch.vocab_start >= 0 && batch.vocab_start <= beside, "vocab_start",
          "a shard that lies within vocab_total");
}

inline void check(const TokenBatch& batch, const PairLoss* pair, const ForwardOutputs& out) {
  const int64_t tokens = num_tokens(batch);
  require_address(out.logps, tokens, "logps");
  require_address(out.row_max, tokens, "row_max");
  require_address(out.log_sum, tokens, "log_sum");
  const bool stats = out.entropy != nullptr;
  require(stats == (out.mean_logits != nullptr) && stats == (out.log_sum_sq_probs != nullptr) &&
              stats == (out.is_top1 != nullptr),
          "statistics", "all of them or none");
  const bool sequences = out.seq_logps != nullptr;
  require(sequences == (out.seq_scale != nullptr) && sequences == (out.seq_counts != nullptr),
          "seq_logps, seq_scale, seq_counts", "all of them or none");
  require(batch.vocab_total == 0 || (!sequences && pair == nullptr), "vocab_total",
          "0 for sums over sequences, which a shard does not have");
  if (pair == nullptr) return;
  require(batch.num_seqs % 2 == 0, "num_seqs", "an even number for a pair loss");
  require_address(out.seq_logps, batch.num_seqs, "seq_logps");
  require_address(out.rewards, batch.num_seqs, "rewards");
  require_address(out.losses, batch.num_seqs, "losses");
  require_address(out.loss, 1, "loss");
}

inline void check(const TokenBatch& batch, const Backward& bwd) {
  const int64_t tokens = num_tokens(batch);
  require(bwd.grad_index >= GradIndex::kToken && bwd.grad_index <= GradIndex::kPair, "grad_index",
          "0 to 2");
  require(bwd.grad_index != GradIndex::kPair || batch.num_seqs % 2 == 0, "num_seqs",
          "an even number for a pair loss");
  require(bwd.grad_dtype >= DType::kFloat32 && bwd.grad_dtype <= DType::kFloat64, "grad_dtype",
          "0 to 3");
  require(bwd.grad_stride >= 0, "grad_stride", "none below 0");
  require(bwd.grad_seq_stride >= 0 && bwd.grad_row_stride >= 0, "grad_logits strides",
          "none below 0");
  require_address(bwd.logps, tokens, "logps");
  require_address(bwd.row_max, tokens, "row_max");
  require_address(bwd.log_sum, tokens, "log_sum");
  require_address(bwd.grad, tokens, "grad");
  require_address(bwd.grad_logits, tokens * batch.vocab, "grad_logits");
}

}  // namespace dpo_kernels
