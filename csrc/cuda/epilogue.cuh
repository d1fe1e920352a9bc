// Sums over sequences and the pair loss, by the block that finishes last.
//
// A sequence is summed in chunks of one fixed length from its own start, a warp each, and the
// chunks in ascending order: the sum does not depend on the batch around the sequence. The sums
// are double, which costs nothing here and leaves one rounding, to float, at the end.
#pragma once

#include "rows.cuh"

namespace dpo_kernels::cuda {

constexpr int kChunk = 512;

struct ChunkSum {
  double logps;
  int64_t count;
};

struct SequenceOutputs {
  float* logps;
  float* scale;
  int64_t* counts;
  float* rewards;
  float* losses;
  float* loss;  // nullptr without a pair loss
  const float* reference_logps;
  float beta;
  float label_smoothing;
  float weight;
  bool average;
  int* blocks_done;
  ChunkSum* chunks;
};

// where a sequence's chunks lie: disjoint, as each sequence has one slot more than it may fill
__device__ __forceinline__ int first_chunk(const Rows& rows, int s) {
  return s + sequence_start(rows, s) / kChunk;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

__device__ __forceinline__ void sum_chunk(const Rows& rows, const float* logps,
                                          const SequenceOutputs& out, int slot) {
  int s = 0, behind = rows.num_seqs;
  while (behind - s > 1) {
    const int middle = (s + behind) / 2;
    if (first_chunk(rows, middle) <= slot) {
      s = middle;
    } else {
      behind = middle;
    }
  }
  const int start = sequence_start(rows, s);
  const int end = sequence_start(rows, s + 1);
  const int begin = start + (slot - first_chunk(rows, s)) * kChunk;
  if (begin >= end) return;
  double sum = 0.0;
  int count = 0;
#pragma unroll 4
  for (int token = begin + lane_id(); token < min(begin + kChunk, end); token += kWarpSize) {
    // from the L2: other multiprocessors stored it
    sum += __ldcg(logps + token);
    count += token - start >= rows.shift && token_label(rows, s, start, token) != rows.ignore_index;
  }
  sum = warp_sum(sum);
  count = __reduce_add_sync(kAllLanes, count);
  if (lane_id() == 0) out.chunks[slot] = {sum, count};
}

// returns what turns d loss / d (sequence logp) into d loss / d (token logp)
__device__ __forceinline__ float finish_sequence(const Rows& rows, const SequenceOutputs& out,
                                                 int s) {
  const int length = sequence_start(rows, s + 1) - sequence_start(rows, s);
  double sum = 0.0;
  int64_t count = 0;
  for (int c = 0; c * kChunk < length; ++c) {
    const ChunkSum chunk = out.chunks[first_chunk(rows, s) + c];
    sum += chunk.logps;
    count += chunk.count;
  }
  const double divisor = out.average && count > 1 ? static_cast<double>(count) : 1.0;
  out.logps[s] = static_cast<float>(sum / divisor);
  out.counts[s] = count;
  out.scale[s] = static_cast<float>(1.0 / divisor);
  return out.scale[s];
}

__device__ __forceinline__ void finish_pair(const Rows& rows, const SequenceOutputs& out,
                                            int pair) {
  const int chosen = pair, rejected = pair + rows.num_seqs / 2;
  const float chosen_scale = finish_sequence(rows, out, chosen);
  const float rejected_scale = finish_sequence(rows, out, rejected);
  const float* const reference = out.reference_logps;
  const float chosen_ratio = out.logps[chosen] - (reference ? reference[chosen] : 0.0f);
  const float rejected_ratio = out.logps[rejected] - (reference ? reference[rejected] : 0.0f);
  const PairResult<float> result =
      sigmoid_loss(chosen_ratio - rejected_ratio, out.beta, out.label_smoothing, out.weight);
  out.rewards[chosen] = out.beta * chosen_ratio;
  out.rewards[rejected] = out.beta * rejected_ratio;
  out.losses[pair] = result.loss;
  out.scale[chosen] = chosen_scale * result.scale;
  out.scale[rejected] = rejected_scale * -result.scale;
}

// all threads of every block call, each after its last store of a token's logp
__device__ __forceinline__ void finish_sequences(const Rows& rows, const float* logps,
                                                 const SequenceOutputs& out) {
  __shared__ bool is_last;
  // the whole block's logps before thread 0 announces them
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(out.blocks_done, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  // is_last, and with it the other blocks' logps, for every thread
  __syncthreads();
  if (!is_last) return;

  const int warps = blockDim.x / kWarpSize;
  const int slots = rows.num_seqs + rows.count / kChunk + 1;
  for (int slot = threadIdx.x / kWarpSize; slot < slots && rows.num_seqs > 0; slot += warps) {
    sum_chunk(rows, logps, out, slot);
  }
  // a thread adds chunks that other warps summed
  __syncthreads();
  const bool pairs = out.loss != nullptr;
  const int items = pairs ? rows.num_seqs / 2 : rows.num_seqs;
  for (int i = threadIdx.x; i < items; i += blockDim.x) {
    if (pairs) {
      finish_pair(rows, out, i);
    } else {
      finish_sequence(rows, out, i);
    }
  }
  if (!pairs) return;
  // the first warp adds losses that all threads made
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  double loss = 0.0;
  for (int i = threadIdx.x; i < items; i += kWarpSize) loss += out.losses[i];
  loss = warp_sum(loss);
  if (threadIdx.x == 0) *out.loss = static_cast<float>(out.weight * loss);
}

}  // namespace dpo_kernels::cuda
