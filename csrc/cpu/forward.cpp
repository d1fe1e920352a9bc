// Forward: log softmax(z)[label] and the statistics of every scored row, then the sums over
// sequences and the pair loss.
#include <algorithm>
#include <cmath>

#include "../checks.h"
#include "rows.h"
#include "threads.h"

namespace dpo_kernels {
namespace {

// A row is summed in segments of this size, whatever the number of threads, and the segments'
// results are added in order, so that a row has the same bits wherever it is computed.
constexpr int64_t kSegment = 8192;

// The segment of the label is cut in two around it: the label stays out of the sums, and what comes
// before it is known apart from what comes after it. A label on another shard is one behind the
// end.
struct Pieces {
  int64_t vocab;
  int64_t label;

  int64_t count() const { return (vocab + kSegment - 1) / kSegment + 1; }
  bool before_label(int64_t piece) const { return piece <= label / kSegment; }
  int64_t begin(int64_t piece) const {
    if (before_label(piece)) return piece * kSegment;
    return std::min(std::max((piece - 1) * kSegment, label + 1), vocab);
  }
  int64_t end(int64_t piece) const {
    if (before_label(piece)) return std::min((piece + 1) * kSegment, label);
    return std::min(piece * kSegment, vocab);
  }
};

template <class A>
struct RowSums {
  PieceSums<A> others;
  A max_before_label = neg_inf<A>();
};

template <class A>
void add_piece(RowSums<A>& row, const PieceSums<A>& piece, bool before_label, bool stats) {
  const SoftmaxSum<A> a = row.others.softmax, b = piece.softmax;
  row.others.softmax = merge(a, b);
  const A max = row.others.softmax.max;
  if (before_label) row.max_before_label = max;
  if (stats) {
    row.others.stats = add_stats(shift_stats(row.others.stats, a.sum, a.max, max),
                                 shift_stats(piece.stats, b.sum, b.max, max));
  }
}

template <class A>
bool label_is_top1(A target, const RowSums<A>& row, int64_t label) {
  const bool first = label == 0 || target > row.max_before_label;
  return first && target >= row.others.softmax.max;
}

template <class A>
void put(void* out, int64_t index, A value) {
  if (out != nullptr) static_cast<A*>(out)[index] = value;
}

template <class A>
void put_row(const ForwardOutputs& out, const ScoredRow& scored, const TokenBatch& batch, A target,
             const RowSums<A>& row) {
  const SoftmaxSum<A>& others = row.others.softmax;
  const int64_t vocab = batch.vocab;
  const bool is_shard = batch.vocab_total > 0, has_label = scored.label < vocab;
  const TokenResult<A> result =
      is_shard ? shard_result(has_label, target, others) : token_logp(target, others);
  put(out.logps, scored.token, result.logp);
  put(out.row_max, scored.token, result.row_max);
  put(out.log_sum, scored.token, result.log_sum);
  if (out.entropy == nullptr) return;

  const RowStats<A> stats =
      is_shard ? shard_stats(has_label, target, others, row.others.stats, result, vocab)
               : row_stats(target, others, row.others.stats, result, vocab);
  put(out.entropy, scored.token, stats.entropy);
  put(out.mean_logits, scored.token, stats.mean_logits);
  put(out.log_sum_sq_probs, scored.token, stats.log_sum_sq_probs);
  out.is_top1[scored.token] = has_label && label_is_top1(target, row, scored.label);
}

template <class T>
class TokenForward {
 public:
  using A = Acc<T>;

  TokenForward(const TokenBatch& batch, const ForwardOutputs& out)
      : batch_(batch),
        out_(out),
        stats_(out.entropy != nullptr),
        transform_(make_transform<A>(batch.transform)),
        passes_(passes_of(current_isa(), TypeTag<T>{})) {}

  void run(const std::vector<ScoredRow>& scored, int threads) const {
    const int64_t rows = static_cast<int64_t>(scored.size());
    threads = useful_threads(rows, batch_.vocab, threads);
    if (rows >= 2 * threads) {
      parallel_for(rows, threads, [&](int64_t r) { whole_row(scored[r]); });
    } else {
      split_rows(scored, threads);
    }
  }

 private:
  PieceSums<A> piece_sums(const ScoredRow& scored, const Pieces& pieces, int64_t piece) const {
    const int64_t begin = pieces.begin(piece), size = pieces.end(piece) - begin;
    const T* x = logits_row<T>(batch_, scored) + begin;
    PieceSums<A> sums = passes_.sums(x, size, transform_, stats_);
    if (!stats_) return sums;
    sums.stats.total *= A(kTotalScale);
    if (!std::isfinite(sums.stats.total)) {
      // once more, each z made smaller before it is added
      Transform<A> smaller = transform_;
      smaller.unit *= A(kTotalScale);
      sums.stats.total = passes_.sums(x, size, smaller, true).stats.total;
    }
    return sums;
  }

  // sum_of(p): the sums of piece p
  template <class SumOf>
  void finish_row(const ScoredRow& scored, const Pieces& pieces, SumOf sum_of) const {
    RowSums<A> row;
    for (int64_t p = 0; p < pieces.count(); ++p) {
      add_piece(row, sum_of(p), pieces.before_label(p), stats_);
    }
    const bool has_label = scored.label < batch_.vocab;
    put_row(out_, scored, batch_, has_label ? target_logit(scored) : A(0), row);
  }

  void whole_row(const ScoredRow& scored) const {
    const Pieces pieces = {batch_.vocab, scored.label};
    finish_row(scored, pieces, [&](int64_t p) { return piece_sums(scored, pieces, p); });
  }

  void split_rows(const std::vector<ScoredRow>& scored, int threads) const {
    const int64_t rows = static_cast<int64_t>(scored.size());
    const int64_t count = Pieces{batch_.vocab, 0}.count();
    std::vector<PieceSums<A>> sums(rows * count);
    parallel_for(rows * count, threads, [&](int64_t i) {
      const ScoredRow& row = scored[i / count];
      sums[i] = piece_sums(row, {batch_.vocab, row.label}, i % count);
    });
    for (int64_t r = 0; r < rows; ++r) {
      finish_row(scored[r], {batch_.vocab, scored[r].label},
                 [&](int64_t p) { return sums[r * count + p]; });
    }
  }

  A target_logit(const ScoredRow& scored) const {
    const T* x = logits_row<T>(batch_, scored) + scored.label;
    if (!transform_.softcap) return to_acc(*x) * transform_.unit;
    // by the pass's own tanh, so that equal logits stay equal
    return passes_.sums(x, 1, transform_, true).stats.total;
  }

  const TokenBatch& batch_;
  const ForwardOutputs& out_;
  const bool stats_;
  const Transform<A> transform_;
  const Passes<T>& passes_;
};

// seq_logps, seq_scale and seq_counts; in double, in the order of the tokens
template <class A>
void sum_sequences(const RowList& list, const A* logps, const ForwardOutputs& out) {
  auto row = list.scored.begin();
  for (int64_t s = 0; s + 1 < static_cast<int64_t>(list.bounds.size()); ++s) {
    double sum = 0;
    int64_t count = 0;
    for (; row != list.scored.end() && row->seq == s; ++row, ++count) sum += logps[row->token];
    const double divisor = out.average ? std::max<double>(1, static_cast<double>(count)) : 1;
    put(out.seq_logps, s, static_cast<A>(sum / divisor));
    put(out.seq_scale, s, static_cast<A>(1 / divisor));
    out.seq_counts[s] = count;
  }
}

template <class A>
void make_pair_loss(const PairLoss& pair, int64_t num_pairs, const ForwardOutputs& out) {
  const A* logps = static_cast<const A*>(out.seq_logps);
  const A* reference = static_cast<const A*>(pair.reference_logps);
  A* scale = static_cast<A*>(out.seq_scale);
  const A beta = static_cast<A>(pair.beta);
  const auto log_ratio = [&](int64_t s) {
    return reference == nullptr ? logps[s] : logps[s] - reference[s];
  };
  double sum = 0;
  for (int64_t chosen = 0; chosen < num_pairs; ++chosen) {
    const int64_t rejected = num_pairs + chosen;
    const PairResult<A> result =
        sigmoid_loss(log_ratio(chosen) - log_ratio(rejected), beta,
                     static_cast<A>(pair.label_smoothing), static_cast<A>(pair.weight));
    put(out.rewards, chosen, beta * log_ratio(chosen));
    put(out.rewards, rejected, beta * log_ratio(rejected));
    put(out.losses, chosen, result.loss);
    scale[chosen] *= result.scale;
    scale[rejected] *= -result.scale;
    sum += result.loss;
  }
  put(out.loss, 0, static_cast<A>(pair.weight * sum));
}

template <class T>
void forward(const TokenBatch& batch, const PairLoss* pair, const ForwardOutputs& out,
             const RowList& list, int threads) {
  using A = Acc<T>;
  const int64_t tokens = num_tokens(batch);
  for (void* each :
       {out.logps, out.row_max, out.log_sum, out.entropy, out.mean_logits, out.log_sum_sq_probs}) {
    if (each != nullptr) std::fill_n(static_cast<A*>(each), tokens, A(0));
  }
  if (out.is_top1 != nullptr) std::fill_n(out.is_top1, tokens, uint8_t{0});

  TokenForward<T>(batch, out).run(list.scored, threads);
  if (out.seq_logps != nullptr) sum_sequences(list, static_cast<const A*>(out.logps), out);
  if (pair != nullptr) make_pair_loss<A>(*pair, batch.num_seqs / 2, out);
}

}  // namespace

int64_t cpu_forward(const TokenBatch& batch, const PairLoss* pair, const ForwardOutputs& out,
                    int threads) {
  check(batch, pair, out);
  const RowList list = list_rows(batch);
  if (list.bad_token >= 0) return list.bad_token;
  dispatch_dtype(batch.dtype, [&](auto tag) {
    forward<typename decltype(tag)::type>(batch, pair, out, list, threads);
  });
  return -1;
}

}  // namespace dpo_kernels
