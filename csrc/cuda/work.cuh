// Which warp works on which spans of the rows that score a token.
//
// One block per multiprocessor stays for the whole launch. The spans of all scored rows are one
// long line, and warps take tickets for pieces of it from a counter: a multiprocessor that gets
// less bandwidth than others, or that another kernel (NCCL's) holds for a while, takes fewer.
// Masked rows cost their label and nothing else. A ticket says which spans, never who has it, and
// no result depends on who had it.
#pragma once

#include "rows.cuh"

namespace dpo_kernels::cuda {

// One block fills the registers of a multiprocessor: 72 a thread, 80 with the statistics, 96 with a
// tanh. Either way more than 40 KiB of loads are in flight on each.
constexpr int kMaxThreads = 896;
constexpr int threads_of(bool stats, bool softcap) {
  return softcap ? 640 : stats ? 768 : kMaxThreads;
}

// Scored rows are counted in this many runs of rows, or fewer.
constexpr int kRuns = kWarpSize * kWarpSize;
// labels that a lane has in flight while it counts
constexpr int kLabelsAhead = 8;
// spans a ticket, but for the last tickets, which are for one: at the end all warps finish together
constexpr int kSpansPerTicket = 4;

// spans [begin, end) of the scored row with this index among the scored rows
struct Part {
  int row;
  int index;
  int begin;
  int end;
  int64_t label;
};

__device__ __forceinline__ int inclusive_sum(int x) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int left = __shfl_up_sync(kAllLanes, x, offset);
    if (lane_id() >= offset) x += left;
  }
  return x;
}

// Where the scored rows are. counts[r]: scored rows in run r and, of its group of 32 runs, those
// before it.
struct ScoredRows {
  int total;
  int run;  // rows, a multiple of 32
  const int* counts;
  const int* group_counts;  // scored rows in each group of 32 runs
};

// Every block counts all the labels: cheaper than to count once and wait. All threads must call.
template <bool kPacked>
__device__ __forceinline__ ScoredRows count_scored(const Rows& rows, int (&counts)[kRuns],
                                                   int (&group_counts)[kWarpSize]) {
  const int lane = lane_id();
  const int warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  const int run = ((rows.count + kRuns - 1) / kRuns + kWarpSize - 1) / kWarpSize * kWarpSize;
  for (int first = warp; first < kRuns; first += kLabelsAhead * warps) {
    int scored[kLabelsAhead] = {};
    for (int begin = 0; begin < run && first * run < rows.count; begin += kWarpSize) {
      int64_t labels[kLabelsAhead];
#pragma unroll
      for (int i = 0; i < kLabelsAhead; ++i) {
        labels[i] = label_of<kPacked>(rows, (first + i * warps) * run + begin + lane);
      }
#pragma unroll
      for (int i = 0; i < kLabelsAhead; ++i) {
        scored[i] += __popc(__ballot_sync(kAllLanes, labels[i] != rows.ignore_index));
      }
    }
#pragma unroll
    for (int i = 0; i < kLabelsAhead; ++i) {
      if (lane == 0 && first + i * warps < kRuns) counts[first + i * warps] = scored[i];
    }
  }
  // a group's runs were counted by several warps
  __syncthreads();
  for (int group = warp; group < kWarpSize; group += warps) {
    const int upto = inclusive_sum(counts[group * kWarpSize + lane]);
    counts[group * kWarpSize + lane] = upto;
    if (lane == kWarpSize - 1) group_counts[group] = upto;
  }
  // every warp looks rows up in all the groups
  __syncthreads();
  return {__reduce_add_sync(kAllLanes, group_counts[lane]), run, counts, group_counts};
}

struct ScoredRow {
  int row;
  int64_t label;
};

// the scored row with this index, 0 <= index < total
__device__ __forceinline__ ScoredRow find_scored(const Rows& rows, const ScoredRows& scored,
                                                 int index) {
  const int lane = lane_id();
  const int groups = inclusive_sum(scored.group_counts[lane]);
  const int group = __popc(__ballot_sync(kAllLanes, groups <= index));
  const int groups_before = __shfl_sync(kAllLanes, groups, (group + 31) % kWarpSize);
  int left = index - (group == 0 ? 0 : groups_before);
  const int upto = scored.counts[group * kWarpSize + lane];
  const int in_group = __popc(__ballot_sync(kAllLanes, upto <= left));
  const int runs_before = __shfl_sync(kAllLanes, upto, (in_group + 31) % kWarpSize);
  left -= in_group == 0 ? 0 : runs_before;
  for (int first = (group * kWarpSize + in_group) * scored.run;; first += kWarpSize) {
    const int64_t label = label_of(rows, first + lane);
    const unsigned are_scored = __ballot_sync(kAllLanes, label != rows.ignore_index);
    const int here = __popc(are_scored);
    if (left < here) {
      const unsigned before = are_scored & ((1u << lane) - 1);
      const bool is_wanted = (are_scored >> lane & 1) != 0 && __popc(before) == left;
      const int at = __ffs(__ballot_sync(kAllLanes, is_wanted)) - 1;
      return {first + at, __shfl_sync(kAllLanes, label, at)};
    }
    left -= here;
  }
}

// Calls visit(part) for parts of the scored rows until there are none left. `next` counts the
// tickets taken and starts at 0. All threads must call.
template <class Visit>
__device__ __forceinline__ void visit_scored(const Rows& rows, int spans, int* next, Visit visit) {
  __shared__ int block_ticket;
  __shared__ int counts[kRuns];
  __shared__ int group_counts[kWarpSize];
  const int warps = blockDim.x / kWarpSize;
  // one atomic for the first tickets of a block, on its way while the labels are counted
  if (threadIdx.x == 0) block_ticket = atomicAdd(next, warps);
  const ScoredRows scored = rows.cu_seqlens != nullptr
                                ? count_scored<true>(rows, counts, group_counts)
                                : count_scored<false>(rows, counts, group_counts);
  // below 2^31: a span is at least 4 KiB of the logits, or a row
  const int total = scored.total * spans;
  const int single = min(total, kSpansPerTicket * warps * static_cast<int>(gridDim.x));
  const int several = (total - single) / kSpansPerTicket;
  const int tickets = several + total - several * kSpansPerTicket;

  int ticket = block_ticket + threadIdx.x / kWarpSize;
  while (ticket < tickets) {
    // the next one is on its way while this one is worked on
    int following = 0;
    if (lane_id() == 0) following = atomicAdd(next, 1);
    const bool is_single = ticket >= several;
    int at = is_single ? several * (kSpansPerTicket - 1) + ticket : ticket * kSpansPerTicket;
    const int behind = at + (is_single ? 1 : kSpansPerTicket);
    while (at < behind) {
      const int index = at / spans;
      const int begin = at - index * spans;
      const int end = min(spans, begin + behind - at);
      const ScoredRow row = find_scored(rows, scored, index);
      visit(Part{row.row, index, begin, end, row.label});
      at += end - begin;
    }
    ticket = __shfl_sync(kAllLanes, following, 0);
  }
}

}  // namespace dpo_kernels::cuda
