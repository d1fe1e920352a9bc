// From the structs of launchers.h to the kernels' parameters: checks, grid and workspace. Host code
// without a call to CUDA, so that it is tested where there is none.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "../checks.h"
#include "backward.cuh"
#include "forward.cuh"

namespace dpo_kernels::cuda {

// beyond checks.h: what these kernels cannot do
inline void check_limits(const TokenBatch& batch) {
  const LogitTransform& f = batch.transform;
  constexpr int64_t kLimit = 1 << 30;
  require(batch.dtype != DType::kFloat64, "dtype", "none of float64 on CUDA");
  require(batch.vocab > 0 && batch.vocab < kLimit, "vocab", "1 to 2^30 - 1");
  require(batch.vocab_total < kLimit, "vocab_total", "less than 2^30");
  require(batch.num_seqs < kLimit, "num_seqs", "less than 2^30");
  require(batch.seq_len < kLimit && num_tokens(batch) < kLimit, "tokens", "less than 2^30");
  require(std::isfinite(f.scale * f.inv_temperature) && f.scale * f.inv_temperature != 0.0 &&
              std::isfinite(f.softcap),
          "transform", "finite numbers, scale and 1 / temperature not 0");
}

inline int span_length(DType dtype) {
  return dtype == DType::kFloat32 ? kSpan<Float32> : kSpan<BFloat16>;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// one block a multiprocessor, fewer when there is less than a span for each warp
inline int forward_blocks(const TokenBatch& batch, int multiprocessors, int threads) {
  const int64_t spans = num_tokens(batch) * ceil_div(batch.vocab, span_length(batch.dtype));
  const int64_t wanted = ceil_div(spans, threads / kWarpSize);
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, multiprocessors));
}

// a span of each warp, of every row: which block runs where and when is left to the device
inline int backward_blocks(const BackwardParams& p, int threads) {
  return static_cast<int>(ceil_div(int64_t{p.rows.count} * p.spans, threads / kWarpSize));
}

// Two counters and one for each scored row first, which the launcher zeroes. Behind them scratch,
// never read before it is written.
struct Workspace {
  int64_t counter_bytes, chunks, partials, bytes;
};

inline Workspace workspace_for(const TokenBatch& batch) {
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
  const int64_t tokens = num_tokens(batch);
  Workspace at = {};
  at.counter_bytes = (2 + tokens) * sizeof(int);
  at.chunks = aligned(at.counter_bytes);
  at.partials = aligned(at.chunks + (batch.num_seqs + tokens / kChunk + 1) * sizeof(ChunkSum));
  const int64_t spans = tokens * ceil_div(batch.vocab, span_length(batch.dtype));
  at.bytes = aligned(at.partials + spans * sizeof(Partial<true>));
  return at;
}

inline Rows make_rows(const TokenBatch& batch) {
  return {batch.labels,
          batch.cu_seqlens,
          batch.label_seq_stride,
          batch.label_row_stride,
          batch.seq_stride,
          batch.row_stride,
          batch.ignore_index,
          make_divisor(std::max<int64_t>(batch.seq_len, 1)),
          static_cast<int>(batch.num_seqs),
          static_cast<int>(batch.seq_len),
          static_cast<int>(num_tokens(batch)),
          batch.shift ? 1 : 0};
}

inline Transform make_transform(double inner, double unit) {
  constexpr double kLog2Of = 1.4426950408889634;
  return {static_cast<float>(unit), static_cast<float>(unit * kLog2Of),
          static_cast<float>(2.0 * inner * kLog2Of)};
}

inline ForwardParams make_forward(const TokenBatch& batch, const PairLoss* pair,
                                  const ForwardOutputs& out, void* workspace, const Workspace& at) {
  const auto as_float = [](void* pointer) { return static_cast<float*>(pointer); };
  char* const base = static_cast<char*>(workspace);
  const auto [inner, unit] = factors(batch.transform);
  ForwardParams p = {};
  p.rows = make_rows(batch);
  p.logits = batch.logits;
  p.vocab = static_cast<int>(batch.vocab);
  p.vocab_start = static_cast<int>(batch.vocab_start);
  p.labels_below = static_cast<int>(labels_below(batch));
  p.is_shard = batch.vocab_total > 0;
  p.spans = static_cast<int>(ceil_div(batch.vocab, span_length(batch.dtype)));
  p.negate = (inner < 0.0) != (unit < 0.0);
  p.transform = make_transform(std::abs(inner), std::abs(unit));
  p.logps = as_float(out.logps);
  p.row_max = as_float(out.row_max);
  p.log_sum = as_float(out.log_sum);
  p.entropy = as_float(out.entropy);
  p.mean_logits = as_float(out.mean_logits);
  p.log_sum_sq_probs = as_float(out.log_sum_sq_probs);
  p.is_top1 = out.is_top1;
  int* const counters = static_cast<int*>(workspace);
  p.next = counters;
  p.arrivals = counters + 2;
  p.partials = reinterpret_cast<float2*>(base + at.partials);
  SequenceOutputs& sequences = p.sequences;
  sequences.logps = as_float(out.seq_logps);
  sequences.scale = as_float(out.seq_scale);
  sequences.counts = out.seq_counts;
  sequences.average = out.average;
  sequences.blocks_done = counters + 1;
  sequences.chunks = reinterpret_cast<ChunkSum*>(base + at.chunks);
  if (pair != nullptr) {
    sequences.rewards = as_float(out.rewards);
    sequences.losses = as_float(out.losses);
    sequences.loss = as_float(out.loss);
    sequences.reference_logps = static_cast<const float*>(pair->reference_logps);
    sequences.beta = static_cast<float>(pair->beta);
    sequences.label_smoothing = static_cast<float>(pair->label_smoothing);
    sequences.weight = static_cast<float>(pair->weight);
  }
  return p;
}

inline BackwardParams make_backward(const TokenBatch& batch, const Backward& bwd) {
  const auto as_float = [](const void* pointer) { return static_cast<const float*>(pointer); };
  const auto [inner, unit] = factors(batch.transform);
  // the first vector of a row may begin up to a vector before it
  const int slack = kVectorBytes / (batch.dtype == DType::kFloat32 ? 4 : 2) - 1;
  BackwardParams p = {};
  p.rows = make_rows(batch);
  p.logits = batch.logits;
  p.grad_logits = bwd.grad_logits;
  p.grad_seq_stride = bwd.grad_seq_stride;
  p.grad_row_stride = bwd.grad_row_stride;
  p.vocab = static_cast<int>(batch.vocab);
  p.vocab_start = static_cast<int>(batch.vocab_start);
  p.spans = static_cast<int>(ceil_div(batch.vocab + slack, span_length(batch.dtype)));
  p.transform = make_transform(inner, unit);
  p.inv_unit = static_cast<float>(1.0 / unit);
  p.dz_dx = static_cast<float>(batch.transform.scale * batch.transform.inv_temperature);
  p.logps = as_float(bwd.logps);
  p.row_max = as_float(bwd.row_max);
  p.log_sum = as_float(bwd.log_sum);
  p.seq_scale = as_float(bwd.seq_scale);
  p.grad = as_float(bwd.grad);
  p.grad_stride = bwd.grad_stride;
  p.grad_index = bwd.grad_index;
  p.zero_unscored = bwd.zero_unscored;
  return p;
}

// Calls visit(E{}) with the element type of the logits.
template <class Visit>
void dispatch_dtype(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(Float32{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kFloat16:
      return visit(Float16{});
    case DType::kFloat64:
      throw std::runtime_error("float64 has no CUDA kernel");
  }
}

// Calls visit(E{}, G{}) with the element types of the logits and of their gradient.
template <class Visit>
void dispatch_dtypes(DType dtype, DType grad_dtype, Visit visit) {
  dispatch_dtype(grad_dtype, [&](auto grad) {
    if (dtype == grad_dtype) return visit(grad, grad);
    if constexpr (!std::is_same_v<decltype(grad), Float32>) {
      if (dtype == DType::kFloat32) return visit(Float32{}, grad);
    }
    throw std::runtime_error("a gradient has the dtype of the logits, or 16 bits of float32 ones");
  });
}

template <class Visit>
void dispatch_flag(bool flag, Visit visit) {
  if (flag) {
    visit(std::true_type{});
  } else {
    visit(std::false_type{});
  }
}

}  // namespace dpo_kernels::cuda
