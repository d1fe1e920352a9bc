// Which rows score a token, and which warp works on which segments.
//
// The grid is one block per multiprocessor and stays for the whole launch. The segments of all the
// rows that cost anything are one long line, cut into equal shares, one per warp: masked rows cost
// their label and nothing else, a few long rows keep every multiprocessor busy, and no warp has
// more than one segment more than another. A share may begin and end inside a row.
#pragma once

#include "elements.cuh"

namespace dpo_kernels::cuda {

// One block fills the registers of a multiprocessor: 72 a thread, 80 with the statistics, 96 with a
// tanh. Either way more than 40 KiB of loads are in flight on each.
constexpr int kMaxThreads = 896;
constexpr int threads_of(bool stats, bool softcap) {
  return softcap ? 640 : stats ? 768 : kMaxThreads;
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
  if (rows.cu_seqlens == nullptr) return row / rows.seq_len;
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

// the label that a row scores, ignore_index where it scores none
__device__ __forceinline__ int64_t label_of(const Rows& rows, int row) {
  const int s = row < 0 ? -1 : sequence_of(rows, row);
  if (s < 0 || row + rows.shift >= sequence_start(rows, s + 1)) return rows.ignore_index;
  return token_label(rows, s, sequence_start(rows, s), row + rows.shift);
}

__device__ __forceinline__ int64_t row_offset(const Rows& rows, int row, int64_t seq_stride,
                                              int64_t row_stride) {
  if (rows.cu_seqlens != nullptr) return row * row_stride;
  const int s = row / rows.seq_len;
  return s * seq_stride + (row - s * rows.seq_len) * row_stride;
}

// segments [begin, end) of a row, from a warp's share
struct Part {
  int row;
  int begin;
  int end;
  int slot;  // for the row's scratch; below the number of rows, and twice that of warps
  bool scored;
  int64_t label;
};

// Calls visit(part) for every part of the calling warp's share, in order. A segment costs
// scored_cost in a row that scores a token and other_cost elsewhere; rows that cost nothing are
// left out. All threads of the block must call.
template <class Visit>
__device__ __forceinline__ void visit_share(const Rows& rows, int scored_cost, int other_cost,
                                            int segments, Visit visit) {
  __shared__ int run_costs[kWarpSize];
  const int lane = lane_id();
  const int warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;

  // every block counts all the labels, a run of rows per warp: cheaper than to count once and wait
  const int groups = (rows.count + kWarpSize - 1) / kWarpSize;
  const int run = (groups + warps - 1) / warps * kWarpSize;
  const int run_begin = min(warp * run, rows.count);
  const int run_end = min(run_begin + run, rows.count);
  int scored = 0;
#pragma unroll 4
  for (int row = run_begin + lane; row < run_end; row += kWarpSize) {
    scored += label_of(rows, row) != rows.ignore_index;
  }
  scored = __reduce_add_sync(kAllLanes, scored);
  if (lane == 0) {
    run_costs[warp] = scored * scored_cost + (run_end - run_begin - scored) * other_cost;
  }
  // the runs of the other warps are read below
  __syncthreads();

  const int run_cost = lane < warps ? run_costs[lane] : 0;
  int64_t upto = run_cost;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int64_t left = __shfl_up_sync(kAllLanes, upto, offset);
    if (lane >= offset) upto += left;
  }
  const int64_t total = __shfl_sync(kAllLanes, upto, kWarpSize - 1) * segments;
  const int64_t all_warps = static_cast<int64_t>(gridDim.x) * warps;
  const int this_warp = blockIdx.x * warps + warp;
  const int64_t begin = total * this_warp / all_warps;
  const int64_t end = total * (this_warp + 1) / all_warps;
  if (begin == end) return;

  // the run, then the group of 32 rows, then the row that holds unit `begin`
  const int first_run = __popc(__ballot_sync(kAllLanes, lane < warps && upto * segments <= begin));
  int row = first_run * run;
  int64_t row_start = __shfl_sync(kAllLanes, upto - run_cost, first_run) * segments;
  for (;; row += kWarpSize) {
    const int cost = row + lane >= rows.count                          ? 0
                     : label_of(rows, row + lane) != rows.ignore_index ? scored_cost
                                                                       : other_cost;
    int group_upto = cost;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int left = __shfl_up_sync(kAllLanes, group_upto, offset);
      if (lane >= offset) group_upto += left;
    }
    const int done = __popc(
        __ballot_sync(kAllLanes, row_start + static_cast<int64_t>(group_upto) * segments <= begin));
    if (done == kWarpSize) {
      row_start +=
          static_cast<int64_t>(__shfl_sync(kAllLanes, group_upto, kWarpSize - 1)) * segments;
      continue;
    }
    row_start += static_cast<int64_t>(__shfl_sync(kAllLanes, group_upto - cost, done)) * segments;
    row += done;
    break;
  }

  // a warp has a slot for the row that it shares with its successors, which may write to it first,
  // and one for its other rows; few rows have one each
  int slot = static_cast<int>(((row_start + 1) * all_warps - 1) / total);
  int skipped = static_cast<int>(begin - row_start);
  for (int64_t left = end - row_start; left > 0; ++row) {
    const int64_t label = row + lane < rows.count ? label_of(rows, row + lane) : rows.ignore_index;
    const unsigned scored_rows = __ballot_sync(kAllLanes, label != rows.ignore_index);
    // rows without cost are passed over, 32 at a time
    const int passed = other_cost != 0 ? 0 : scored_rows == 0 ? kWarpSize : __ffs(scored_rows) - 1;
    row += passed == kWarpSize ? kWarpSize - 1 : passed;
    if (passed == kWarpSize) continue;
    const bool scored = (scored_rows >> passed & 1) != 0;
    const int cost = scored ? scored_cost : other_cost;
    // a segment belongs to the share that holds its first unit of cost
    const int part_begin = (skipped + cost - 1) / cost;
    const int part_end = left < static_cast<int64_t>(segments) * cost
                             ? (static_cast<int>(left) + cost - 1) / cost
                             : segments;
    if (part_begin < part_end) {
      const int whole = part_end - part_begin == segments ? static_cast<int>(all_warps) : 0;
      visit(Part{row, part_begin, part_end, rows.count <= 2 * all_warps ? row : slot + whole,
                 scored, __shfl_sync(kAllLanes, label, passed)});
    }
    left -= static_cast<int64_t>(segments) * cost;
    skipped = 0;
    slot = this_warp;
  }
}

}  // namespace dpo_kernels::cuda
