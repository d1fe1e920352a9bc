// Per scored row r with label y, in one read of the logits:
//   logp = z_y - max z - log sum exp(z - max z)
// and, on request, the entropy, the mean logit, log sum p^2 and whether y is the first maximum. The
// block that finishes last turns them into sequence sums and the pair loss (epilogue.cuh).
//
// A warp reduces a span of a row: each lane keeps a running maximum and sums over its own elements,
// the lanes are added up at the end of the span. The target is left out of all of them
// (scalar_math.h, token_logp). The spans of a row meet in the workspace, whether one warp reduced
// them or several: the last to arrive goes through all of them, span j on lane j mod 32 in
// ascending order, then over the lanes. So the bits of a row's results depend on nothing but the
// row.
#pragma once

#include "epilogue.cuh"
#include "lane_sums.cuh"
#include "work.cuh"

namespace dpo_kernels::cuda {

struct ForwardParams {
  Rows rows;
  const void* logits;
  int vocab;
  int vocab_start;
  int labels_below;
  bool is_shard;
  int spans;  // of a row
  Transform transform;
  bool negate;  // z falls with x: x is read with its sign flipped
  float* logps;
  float* row_max;
  float* log_sum;
  float* entropy;
  float* mean_logits;
  float* log_sum_sq_probs;
  uint8_t* is_top1;
  SequenceOutputs sequences;
  int* next;         // tickets taken
  int* arrivals;     // [scored rows]: spans done of rows that warps share
  float2* partials;  // [scored rows, spans, kPartialWords]
};

// everything that is wanted of a scored row, from all of its elements but the label's
template <bool kStats>
__device__ __forceinline__ void finish_row(const ForwardParams& p, int token, int label,
                                           float target, const Partial<kStats>& lanes) {
  const Partial<kStats> others = combine_lanes(lanes);
  if (lane_id() != 0) return;
  // NaN of a label that no shard has
  const bool has_target = label >= 0 || target != target;
  const TokenResult<float> result = p.is_shard ? shard_result(has_target, target, others.softmax)
                                               : token_logp(target, others.softmax);
  p.logps[token] = result.logp;
  if (p.row_max != nullptr) p.row_max[token] = result.row_max;
  if (p.log_sum != nullptr) p.log_sum[token] = result.log_sum;
  if constexpr (kStats) {
    const RowStats<float> stats =
        p.is_shard ? shard_stats(has_target, target, others.softmax, others.stats, result, p.vocab)
                   : row_stats(target, others.softmax, others.stats, result, p.vocab);
    p.entropy[token] = stats.entropy;
    p.mean_logits[token] = stats.mean_logits;
    p.log_sum_sq_probs[token] = stats.log_sum_sq_probs;
    p.is_top1[token] =
        label >= 0 && others.beats_target == 0.0f && result.log_sum == result.log_sum;
  }
}

// the outputs of the tokens that no row scores
template <bool kStats>
__device__ __forceinline__ void clear_unscored(const ForwardParams& p) {
  const int threads = gridDim.x * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.rows.count; i += threads) {
    const int token = static_cast<int>(i);
    if (label_of(p.rows, token - p.rows.shift) != p.rows.ignore_index) continue;
    p.logps[token] = 0.0f;
    if (p.row_max != nullptr) p.row_max[token] = 0.0f;
    if (p.log_sum != nullptr) p.log_sum[token] = 0.0f;
    if constexpr (kStats) {
      p.entropy[token] = 0.0f;
      p.mean_logits[token] = 0.0f;
      p.log_sum_sq_probs[token] = 0.0f;
      p.is_top1[token] = 0;
    }
  }
}

template <class E, bool kStats, bool kSoftcap>
__device__ __forceinline__ void forward_part(const ForwardParams& p, const Part& part) {
  const typename E::Bits* row = static_cast<const typename E::Bits*>(p.logits) +
                                row_offset(p.rows, part.row, p.rows.seq_stride, p.rows.row_stride);
  // a label out of range makes every result of the row NaN
  const bool is_label = part.label >= 0 && part.label < p.labels_below;
  const int label = column_of(is_label ? part.label : -1, p.vocab_start, p.vocab);
  RowReader<E> reader = {row, p.vocab, label, p.negate ? E::kSigns : 0, is_label ? 0.0f : NAN};
  if (label >= 0) reader.target = capped<kSoftcap>(p.transform, reader.stored(label));
  // made anew for each span: an address kept in the loop is two registers too many on sm_80
  const auto partial_at = [&](int j) {
    return p.partials + (int64_t(part.index) * p.spans + j) * kPartialWords<kStats>;
  };
  for (int j = part.begin; j < part.end; ++j) {
    const Partial<kStats> span = reduce_span<E, kStats, kSoftcap>(reader, j, p.transform);
    if (lane_id() == 0) store_partial(partial_at(j), span);
  }

  const int spans = part.end - part.begin;
  if (spans < p.spans) {
    int arrived = 0;
    if (lane_id() == 0) {
      // this warp's spans, all stored by this lane, before its arrival is seen
      __threadfence();
      arrived = atomicAdd(p.arrivals + part.index, spans) + spans;
      // no span of another warp is loaded before all have arrived
      __threadfence();
    }
    if (__shfl_sync(kAllLanes, arrived, 0) != p.spans) return;
  }
  // what lane 0 has stored, and has seen of the other warps, for all lanes
  __syncwarp();
  Partial<kStats> mine = {};
  // seldom more than one
#pragma unroll 1
  for (int j = lane_id(); j < p.spans; j += kWarpSize) {
    mine = merge_partials(mine, load_partial<kStats>(partial_at(j)));
  }
  finish_row(p, part.row + p.rows.shift, label, p.transform.unit * reader.target, mine);
}

template <class E, bool kStats, bool kSoftcap>
__global__ void __launch_bounds__(threads_of(kStats, kSoftcap), 1)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  visit_scored(p.rows, p.spans, p.next,
               [&](const Part& part) { forward_part<E, kStats, kSoftcap>(p, part); });
  // now, when other warps still have work that this one cannot take
  clear_unscored<kStats>(p);
  if (p.sequences.logps != nullptr || p.sequences.loss != nullptr) {
    finish_sequences(p.rows, p.logps, p.sequences);
  }
}

}  // namespace dpo_kernels::cuda
