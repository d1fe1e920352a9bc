// The whole C++ API: plain structs of raw pointers, sizes and strides, and two functions a device.
// No Python and no torch here, so that any binding can sit on top.
//
// Vocabulary. A batch holds num_seqs sequences: the P chosen answers, then the P rejected ones.
//   padded  cu_seqlens == nullptr: sequence s is row s of [num_seqs, seq_len, vocab]
//   packed  cu_seqlens[num_seqs + 1]: sequence s is rows cu_seqlens[s] .. cu_seqlens[s + 1] of
//           [seq_len, vocab]; seq_len is then the number of rows of the whole batch
// Tokens are numbered like labels: token i = s * seq_len + t (padded) or its row (packed). With
// shift the logits one row earlier in the same sequence score it, so the first token of a sequence
// is never scored and the last row of a sequence scores nothing. A token is scored when its label
// differs from ignore_index and has such a row.
//
// Shards. With vocab_total > 0 the logits are columns vocab_start .. vocab_start + vocab of a
// vocabulary of vocab_total; labels count from the start of that. A label on another shard is legal
// and its token scored. What a shard gives for a row is enough to make the whole row's results of,
// see ForwardOutputs; sequences and pairs are for whoever has the whole.
//
// Every per-token output lies at its token's number, contiguous, and is 0 where nothing is scored.
// "acc" is float, or double for float64 logits.
#pragma once

#include <cstdint>
#include <string>

namespace dpo_kernels {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// What the kernels see of the stored logits x: z = softcap * tanh(scale * x / softcap) /
// temperature, or z = scale * x / temperature when softcap is 0.
struct LogitTransform {
  double scale;
  double softcap;
  double inv_temperature;
};

// The same with fewer operations: z = unit * tanh(inner * x), or unit * x without a softcap.
struct TransformFactors {
  double inner;
  double unit;
};

inline TransformFactors factors(const LogitTransform& t) {
  if (t.softcap == 0) return {1, t.scale * t.inv_temperature};
  return {t.scale / t.softcap, t.softcap * t.inv_temperature};
}

struct TokenBatch {
  const void* logits;  // unit stride along the vocabulary
  DType dtype;
  int64_t vocab;
  int64_t seq_stride;  // in elements; unused when packed
  int64_t row_stride;
  const int64_t* labels;
  int64_t label_seq_stride;
  int64_t label_row_stride;
  const int64_t* cu_seqlens;
  int64_t num_seqs;
  int64_t seq_len;
  int64_t ignore_index;
  bool shift;
  LogitTransform transform;
  int64_t vocab_start = 0;
  int64_t vocab_total = 0;  // 0: the logits hold the whole vocabulary
};

inline int64_t labels_below(const TokenBatch& batch) {
  return batch.vocab_total > 0 ? batch.vocab_total : batch.vocab;
}

inline int64_t num_tokens(const TokenBatch& batch) {
  return batch.cu_seqlens == nullptr ? batch.num_seqs * batch.seq_len : batch.seq_len;
}

// The pair loss that is made inside the forward launch (DPO, arXiv:2305.18290, eq. 7, with the
// smoothing of cDPO): with d = beta * ((logp_w - ref_w) - (logp_l - ref_l)),
//   loss = -(1 - label_smoothing) * log sigmoid(d) - label_smoothing * log sigmoid(-d)
struct PairLoss {
  const void* reference_logps;  // acc [num_seqs], or nullptr: all 0 (reference free)
  double beta;
  double label_smoothing;
  double weight;  // d(scalar loss) / d(loss of a pair): 1 / P for the mean, 1 for the sum
};

// logps, row_max and log_sum are always made. The others where they are not nullptr: the statistics
// together (entropy .. is_top1), the sequences together (seq_logps .. seq_counts), and with a pair
// loss its outputs (rewards .. loss), which need the sequences.
//
// Of a shard, all are those of a softmax over its columns alone, but for logps, which holds the
// label's z, 0 where the label is on another shard. is_top1 is 0 there too. Columns that are all
// -inf have the log_sum, entropy and log_sum_sq_probs 0.
struct ForwardOutputs {
  void* logps;             // acc [tokens]: log softmax(z)[label]
  void* row_max;           // acc [tokens]: max of z
  void* log_sum;           // acc [tokens]: log sum exp(z - row_max)
  void* entropy;           // acc [tokens]: -sum p log p, in nats
  void* mean_logits;       // acc [tokens]: mean of z over the vocabulary
  void* log_sum_sq_probs;  // acc [tokens]: log sum p^2
  uint8_t* is_top1;        // [tokens]: 1 when the label is the first maximum of z
  void* seq_logps;         // acc [num_seqs]: sum of logps, divided by max(count, 1) with average
  void* seq_scale;         // acc [num_seqs]: what turns grad_output into c (see Backward)
  int64_t* seq_counts;     // [num_seqs]: scored tokens
  void* rewards;           // acc [num_seqs]: beta * (logp - ref)
  void* losses;            // acc [num_seqs / 2]
  void* loss;              // acc scalar: weight * sum of losses
  bool average;
};

// seq_scale without a pair loss: 1, or 1 / max(count, 1) with average. With one: that times
// d(weight * loss)/d(seq_logps).

enum class GradIndex : int32_t { kToken = 0, kSequence = 1, kPair = 2 };

// dlogits[row of token i, :] = c_i * (onehot(label_i) - softmax(z)) * dz/dx, zeros in every other
// row, with c_i = seq_scale[s] (1 where nullptr) * grad[stride * (i, s or s mod num_seqs / 2)]. Of
// a shard too, where logps, row_max and log_sum are the whole row's and onehot may have no 1.
struct Backward {
  const void* logps;  // from forward
  const void* row_max;
  const void* log_sum;
  const void* seq_scale;
  const void* grad;
  GradIndex grad_index;
  int64_t grad_stride;  // 0: one scalar for all
  void* grad_logits;    // of grad_dtype; may be the logits themselves (in place)
  DType grad_dtype;     // the logits'; CUDA: also 16 bits for float32 logits
  int64_t grad_seq_stride;
  int64_t grad_row_stride;
  bool zero_unscored;  // false: the caller knows that those rows hold zeros already
};

// CPU. Structs that cannot be right (checks.h; a batch when it is made) throw std::invalid_argument
// with the field's name. A label outside [0, labels_below(batch)) stops the call before anything is
// written: its token number is returned, -1 when there is none. threads bounds the threads used,
// the caller's included.
int64_t cpu_forward(const TokenBatch& batch, const PairLoss* pair, const ForwardOutputs& out,
                    int threads);
int64_t cpu_backward(const TokenBatch& batch, const Backward& bwd, int threads);
// The instruction set chosen at run time: "avx512", "avx2" or "baseline".
const char* cpu_isa();
// For tests: takes another one from now on; false when the machine cannot run it. nullptr: the
// best.
bool cpu_set_isa(const char* name);
// Takes GOMP_parallel of the caller's OpenMP runtime, to work on its threads instead of own ones:
// for milliseconds after each region those spin on the cores that other threads would need.
// nullptr: own threads, as in the child of a fork.
void cpu_share_openmp(void* gomp_parallel);

#ifdef DPO_KERNELS_WITH_CUDA
// Why the kernels cannot run on a device: its driver is too old for the CUDA runtime in this
// binary, or the binary holds no code for it. Empty when they can.
std::string cuda_device_problem(int device);
// CUDA. Throw std::invalid_argument as above, and std::runtime_error with the kernel's name and the
// CUDA error. A label outside
// [0, labels_below(batch)) makes the results of its row NaN and is never used as an offset.
// workspace: cuda_workspace_bytes(batch) bytes, 256-byte aligned, of any contents. Nothing
// of it is needed after the call, in the order of the stream.
int64_t cuda_workspace_bytes(const TokenBatch& batch);
void cuda_forward(const TokenBatch& batch, const PairLoss* pair, const ForwardOutputs& out,
                  void* workspace, int device, void* stream);
void cuda_backward(const TokenBatch& batch, const Backward& bwd, int device, void* stream);
#endif

}  // namespace dpo_kernels
