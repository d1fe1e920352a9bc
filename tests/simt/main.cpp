// The kernels under a sanitizer: `main`, `main sites` to list the synchronisations that were met,
// `main drop SITE` to leave one of them out. Exits with 0 only when all values are right; a
// sanitizer's report gives its own status.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "driver.h"

using namespace dpo_kernels;

namespace {

constexpr int kBlocks = 3;
constexpr double kBeta = 0.2;

struct Problem {
  int vocab, seqs, length, rows;
  bool packed;
  std::vector<float> logits;
  std::vector<int64_t> labels;
  std::vector<int64_t> bounds;

  Problem(int vocab, int seqs, int length, bool packed)
      : vocab(vocab),
        seqs(seqs),
        length(length),
        rows(seqs * length),
        packed(packed),
        logits(size_t(rows) * vocab) {
    for (int s = 0; s <= seqs; ++s) bounds.push_back(s * length);
    std::mt19937 random(vocab);
    std::normal_distribution<float> normal(0.0f, 2.0f);
    for (float& x : logits) x = normal(random);
    for (int i = 0; i < rows; ++i) {
      labels.push_back(random() % 3 == 0 ? -100 : static_cast<int64_t>(random() % vocab));
    }
  }

  TokenBatch batch() const {
    return {logits.data(),
            DType::kFloat32,
            vocab,
            int64_t(length) * vocab,
            vocab,
            labels.data(),
            length,
            1,
            packed ? bounds.data() : nullptr,
            seqs,
            packed ? rows : length,
            -100,
            true,
            {1.0, 0.0, 1.0}};
  }

  bool scored(int token) const { return token % length > 0 && labels[token] != -100; }
  const float* row(int token) const { return logits.data() + size_t(token - 1) * vocab; }

  double log_sum(int token) const {
    double sum = 0.0;
    for (int v = 0; v < vocab; ++v) sum += std::exp(double(row(token)[v]));
    return std::log(sum);
  }
};

bool near(double ours, double truth, const char* name, int at) {
  if (std::abs(ours - truth) <= 1e-5 * (1.0 + std::abs(truth))) return true;
  std::fprintf(stderr, "%s[%d]: %.9g instead of %.9g\n", name, at, ours, truth);
  return false;
}

struct Results {
  std::vector<float> logps, row_max, log_sum, entropy, mean_logits, log_sum_sq_probs;
  std::vector<uint8_t> is_top1;
  std::vector<float> seq_logps, seq_scale, rewards, losses;
  std::vector<int64_t> seq_counts;
  float loss = NAN;

  explicit Results(const Problem& problem)
      : is_top1(problem.rows, 77), losses(problem.seqs / 2, NAN), seq_counts(problem.seqs, -1) {
    for (auto* tokens : {&logps, &row_max, &log_sum, &entropy, &mean_logits, &log_sum_sq_probs}) {
      tokens->assign(problem.rows, NAN);
    }
    for (auto* sequences : {&seq_logps, &seq_scale, &rewards}) sequences->assign(problem.seqs, NAN);
  }

  ForwardOutputs outputs(bool stats) {
    return {logps.data(),
            row_max.data(),
            log_sum.data(),
            stats ? entropy.data() : nullptr,
            stats ? mean_logits.data() : nullptr,
            stats ? log_sum_sq_probs.data() : nullptr,
            stats ? is_top1.data() : nullptr,
            seq_logps.data(),
            seq_scale.data(),
            seq_counts.data(),
            rewards.data(),
            losses.data(),
            &loss,
            false};
  }
};

bool check_forward(const Problem& problem, const Results& results, bool stats) {
  bool right = true;
  std::vector<double> sums(problem.seqs);
  double loss = 0.0;
  for (int i = 0; i < problem.rows; ++i) {
    if (!problem.scored(i)) {
      right &= near(results.logps[i], 0.0, "logps", i);
      continue;
    }
    const double log_sum = problem.log_sum(i);
    const double logp = problem.row(i)[problem.labels[i]] - log_sum;
    right &= near(results.logps[i], logp, "logps", i);
    sums[i / problem.length] += logp;
    double entropy = 0.0;
    for (int v = 0; v < problem.vocab; ++v) {
      const double log_prob = problem.row(i)[v] - log_sum;
      entropy -= log_prob * std::exp(log_prob);
    }
    if (stats) right &= near(results.entropy[i], entropy, "entropy", i);
  }
  for (int s = 0; s < problem.seqs; ++s)
    right &= near(results.seq_logps[s], sums[s], "seq_logps", s);
  for (int i = 0; i < problem.seqs / 2; ++i) {
    const double term = std::log1p(std::exp(-kBeta * (sums[i] - sums[i + problem.seqs / 2])));
    right &= near(results.losses[i], term, "losses", i);
    loss += term;
  }
  return right && near(results.loss, loss, "loss", 0);
}

bool check_backward(const Problem& problem, const Results& results,
                    const std::vector<float>& grad) {
  bool right = true;
  for (int i = 0; i < problem.rows; ++i) {
    const int token = i + 1;
    const bool scored = token < problem.rows && problem.scored(token);
    const double log_sum = scored ? problem.log_sum(token) : 0.0;
    for (int v = 0; v < problem.vocab; ++v) {
      double truth = 0.0;
      if (scored) {
        truth = results.seq_scale[token / problem.length] *
                ((v == problem.labels[token]) - std::exp(problem.row(token)[v] - log_sum));
      }
      right &= near(grad[size_t(i) * problem.vocab + v], truth, "grad", i);
    }
  }
  return right;
}

bool run_forward(const Problem& problem, bool stats, const simt::Launch& launch, Results& results) {
  const TokenBatch batch = problem.batch();
  const PairLoss pair = {nullptr, kBeta, 0.0, 1.0};
  // the exact size, so that AddressSanitizer sees one byte beyond it
  std::vector<char> workspace(simt_driver::workspace_bytes(batch), 0x7f);
  const ForwardOutputs out = results.outputs(stats);
  bool right = true;
  for (int replay = 0; replay < 2; ++replay) {
    simt_driver::forward(batch, &pair, out, workspace.data(), launch);
    right &= check_forward(problem, results, stats);
  }
  return right;
}

bool run(const Problem& problem, bool stats, const simt::Launch& launch) {
  const TokenBatch batch = problem.batch();
  Results results(problem);
  const bool right = run_forward(problem, stats, launch, results);
  const float one = 1.0f;
  std::vector<float> grad(problem.logits.size(), NAN);
  const Backward bwd = {results.logps.data(),
                        results.row_max.data(),
                        results.log_sum.data(),
                        results.seq_scale.data(),
                        &one,
                        GradIndex::kPair,
                        0,
                        grad.data(),
                        DType::kFloat32,
                        batch.seq_stride,
                        batch.row_stride,
                        true};
  simt_driver::backward(batch, bwd, launch);
  return right & check_backward(problem, results, grad);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "drop") == 0) simt::drop(argv[2]);
  bool right = true;
  using simt::Order;
  // more pairs than a warp has lanes; backward does not see pairs, and would have 70 blocks, each
  // of 64 fibers that ThreadSanitizer takes 3 ms to make
  const Problem pairs(3, 70, 2, false);
  Results of_pairs(pairs);
  right &= run_forward(pairs, false, {2, 64, Order::kForward, 1, 1}, of_pairs);
  // rows of less than a vector
  right &= run(Problem(3, 2, 4, false), false, {2, 64, Order::kForward, 1, 1});
  // rows of three spans, most of them shared by warps
  const Problem rows(4103, 2, 4, false), packed(4103, 2, 4, true);
  right &= run(rows, true, {kBlocks, 64, Order::kShuffled, 1, 1});
  right &= run(packed, false, {kBlocks, 64, Order::kReversed, 1, kBlocks});
  if (argc == 2 && std::strcmp(argv[1], "sites") == 0)
    simt::for_each_site([](const char* site) { std::puts(site); });
  return right ? 0 : 1;
}
