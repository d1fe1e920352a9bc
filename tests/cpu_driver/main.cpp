// The CPU kernels without Python, for the sanitizers: every instruction set, dtype and layout, on
// memory of the exact size, and calls that overlap on the pool's threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "launchers.h"

using namespace dpo_kernels;

namespace {

constexpr int64_t kSeqs = 4, kLength = 3, kTokens = kSeqs * kLength;

// of the exact size, so that the first byte behind it is out of bounds
using Memory = std::unique_ptr<char[]>;

void run(DType dtype, int64_t vocab, bool packed, bool shift, double softcap, int threads) {
  const int64_t size = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  const int64_t acc = dtype == DType::kFloat64 ? 8 : 4;
  // every byte pattern is a finite number of these dtypes, and all are nearly the same
  Memory logits(new char[kTokens * vocab * size]), grad_logits(new char[kTokens * vocab * size]);
  std::memset(logits.get(), 0x3c, kTokens * vocab * size);
  std::vector<int64_t> labels(kTokens), bounds(kSeqs + 1), counts(kSeqs);
  for (int64_t i = 0; i < kTokens; ++i) labels[i] = i % 4 == 2 ? -100 : i * 7 % vocab;
  for (int64_t s = 0; s <= kSeqs; ++s) bounds[s] = s * kLength;
  Memory tokens(new char[6 * kTokens * acc]), seqs(new char[3 * kSeqs * acc]);
  Memory losses(new char[kSeqs / 2 * acc]), loss(new char[acc]), grad(new char[acc]);
  std::unique_ptr<uint8_t[]> is_top1(new uint8_t[kTokens]);
  std::memset(grad.get(), 0x3c, acc);

  TokenBatch batch = {};
  batch.logits = logits.get();
  batch.dtype = dtype;
  batch.vocab = vocab;
  batch.seq_stride = kLength * vocab;
  batch.row_stride = vocab;
  batch.labels = labels.data();
  batch.label_seq_stride = kLength;
  batch.label_row_stride = 1;
  batch.cu_seqlens = packed ? bounds.data() : nullptr;
  batch.num_seqs = kSeqs;
  batch.seq_len = packed ? kTokens : kLength;
  batch.ignore_index = -100;
  batch.shift = shift;
  batch.transform = {1.0, softcap, 0.5};
  const auto row = [acc](const Memory& memory, int64_t index, int64_t count) -> void* {
    return memory.get() + index * count * acc;
  };
  ForwardOutputs out = {};
  out.logps = row(tokens, 0, kTokens);
  out.row_max = row(tokens, 1, kTokens);
  out.log_sum = row(tokens, 2, kTokens);
  out.entropy = row(tokens, 3, kTokens);
  out.mean_logits = row(tokens, 4, kTokens);
  out.log_sum_sq_probs = row(tokens, 5, kTokens);
  out.is_top1 = is_top1.get();
  out.seq_logps = row(seqs, 0, kSeqs);
  out.seq_scale = row(seqs, 1, kSeqs);
  out.rewards = row(seqs, 2, kSeqs);
  out.seq_counts = counts.data();
  out.losses = losses.get();
  out.loss = loss.get();
  const PairLoss pair = {nullptr, 0.1, 0.1, 0.5};
  Backward bwd = {};
  bwd.logps = out.logps;
  bwd.row_max = out.row_max;
  bwd.log_sum = out.log_sum;
  bwd.seq_scale = out.seq_scale;
  bwd.grad = grad.get();
  bwd.grad_index = GradIndex::kPair;
  bwd.grad_logits = grad_logits.get();
  bwd.grad_dtype = dtype;
  bwd.grad_seq_stride = batch.seq_stride;
  bwd.grad_row_stride = vocab;
  bwd.zero_unscored = true;
  if (cpu_forward(batch, &pair, out, threads) >= 0 || cpu_backward(batch, bwd, threads) >= 0) {
    std::abort();
  }
  // equal logits: the log-prob is -log V
  const double logp =
      acc == 8 ? static_cast<double*>(out.logps)[1] : static_cast<float*>(out.logps)[1];
  if (!(std::abs(logp + std::log(static_cast<double>(vocab))) < 1e-4)) std::abort();

  // the middle of three shards: most labels are in none of its columns
  batch.vocab_start = vocab;
  batch.vocab_total = 3 * vocab;
  for (int64_t i = 0; i < kTokens; ++i) labels[i] = i % 4 == 2 ? -100 : i * 7 % (3 * vocab);
  out.seq_logps = out.seq_scale = nullptr;
  out.seq_counts = nullptr;
  bwd.seq_scale = nullptr;
  bwd.grad_index = GradIndex::kToken;
  if (cpu_forward(batch, nullptr, out, threads) >= 0 || cpu_backward(batch, bwd, threads) >= 0) {
    std::abort();
  }
  const double log_sum =
      acc == 8 ? static_cast<double*>(out.log_sum)[1] : static_cast<float*>(out.log_sum)[1];
  if (!(std::abs(log_sum - std::log(static_cast<double>(vocab))) < 1e-4)) std::abort();
}

void run_all(int threads, bool large) {
  for (int dtype = 0; dtype < 4; ++dtype) {
    for (const int64_t vocab :
         {int64_t{1}, int64_t{5}, int64_t{67}, int64_t{8193}, int64_t{50000}}) {
      if (vocab > 8192 && !large) continue;
      for (int flags = 0; flags < 8; ++flags) {
        run(static_cast<DType>(dtype), vocab, flags & 1, flags & 2, flags & 4 ? 30.0 : 0.0,
            threads);
      }
    }
  }
}

}  // namespace

int main() {
  for (const char* isa : {"avx512", "avx2", "baseline"}) {
    if (!cpu_set_isa(isa)) continue;
    run_all(3, true);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back([] { run_all(3, false); });
    run(DType::kFloat32, 50000, false, false, 0.0, 4);
    for (std::thread& caller : callers) caller.join();
    std::puts(isa);
  }
}
