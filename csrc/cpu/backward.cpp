// Backward: dlogits = c * (onehot(label) - softmax(z)) * dz/dx in the scored rows, zeros elsewhere.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "../checks.h"
#include "rows.h"
#include "threads.h"

namespace dpo_kernels {
namespace {

// a row is cut for several threads only into parts of at least this size
constexpr int64_t kLeastPart = 8192;

template <class A>
A gradient_of(const TokenBatch& batch, const Backward& bwd, const ScoredRow& scored) {
  int64_t index = scored.token;
  if (bwd.grad_index == GradIndex::kSequence) index = scored.seq;
  if (bwd.grad_index == GradIndex::kPair) index = scored.seq % (batch.num_seqs / 2);
  const A grad = static_cast<const A*>(bwd.grad)[index * bwd.grad_stride];
  const A* scale = static_cast<const A*>(bwd.seq_scale);
  const A c = scale == nullptr ? grad : scale[scored.seq] * grad;
  // a NaN with a payload would not survive the rounding to bfloat16
  return c == c ? c : std::numeric_limits<A>::quiet_NaN();
}

// dz/dx where tanh is 0, and at x
template <class A>
A steepest(const Transform<A>& transform) {
  return transform.softcap ? transform.inner * transform.unit : transform.unit;
}
template <class A>
A derivative_at(A x, const Transform<A>& transform) {
  if (!transform.softcap) return transform.unit;
  const A tanh = std::tanh(transform.inner * x);
  return steepest(transform) * ((A(1) - tanh) * (A(1) + tanh));
}

template <class T>
class TokenBackward {
 public:
  using A = Acc<T>;

  TokenBackward(const TokenBatch& batch, const Backward& bwd)
      : batch_(batch),
        bwd_(bwd),
        transform_(make_transform<A>(batch.transform)),
        passes_(passes_of(current_isa(), TypeTag<T>{})) {}

  // entries [begin, end) of a scored row
  void fill(const ScoredRow& scored, int64_t begin, int64_t end) const {
    const T* x = logits_row<T>(batch_, scored);
    T* out = gradient_row(scored.token - (batch_.shift ? 1 : 0));
    const A c = gradient_of<A>(batch_, bwd_, scored);
    const RowGradient<A> row = {acc(bwd_.row_max, scored), acc(bwd_.log_sum, scored),
                                -c * steepest(transform_)};
    const bool has_label = begin <= scored.label && scored.label < end;
    // before the pass, which may overwrite it
    const A at_label = has_label ? to_acc(x[scored.label]) : A(0);
    passes_.gradient(x + begin, end - begin, transform_, row, out + begin);
    if (has_label) {
      const A entry = one_minus_target(acc(bwd_.logps, scored)) * c;
      out[scored.label] = from_acc<T>(entry * derivative_at(at_label, transform_));
    }
  }

  void zero(int64_t row, int64_t begin, int64_t end) const {
    std::memset(gradient_row(row) + begin, 0, (end - begin) * sizeof(T));
  }

 private:
  T* gradient_row(int64_t row) const {
    return static_cast<T*>(bwd_.grad_logits) +
           row_offset(batch_, row, bwd_.grad_seq_stride, bwd_.grad_row_stride);
  }

  static A acc(const void* values, const ScoredRow& scored) {
    return static_cast<const A*>(values)[scored.token];
  }

  const TokenBatch& batch_;
  const Backward& bwd_;
  const Transform<A> transform_;
  const Passes<T>& passes_;
};

struct RowTask {
  int64_t row;
  const ScoredRow* scored;  // nullptr: nothing is scored here
};

// in the order of memory
std::vector<RowTask> list_tasks(const TokenBatch& batch, const std::vector<ScoredRow>& scored,
                                bool unscored_too) {
  std::vector<RowTask> tasks;
  tasks.reserve(unscored_too ? num_tokens(batch) : scored.size());
  int64_t row = 0;
  const auto skip_to = [&](int64_t next) {
    for (; unscored_too && row < next; ++row) tasks.push_back({row, nullptr});
  };
  for (const ScoredRow& each : scored) {
    const int64_t own = each.token - (batch.shift ? 1 : 0);
    skip_to(own);
    tasks.push_back({own, &each});
    row = own + 1;
  }
  skip_to(num_tokens(batch));
  return tasks;
}

template <class T>
void backward(const TokenBatch& batch, const Backward& bwd, const RowList& list, int threads) {
  const TokenBackward<T> kernel(batch, bwd);
  const std::vector<RowTask> tasks = list_tasks(batch, list.scored, bwd.zero_unscored);
  const int64_t rows = static_cast<int64_t>(tasks.size());
  threads = useful_threads(rows, batch.vocab, threads);

  const int64_t most_parts = std::max<int64_t>(batch.vocab / kLeastPart, 1);
  const int64_t parts = rows < 4 * threads ? std::min<int64_t>(most_parts, 4 * threads) : 1;
  const int64_t part_size = (batch.vocab + parts - 1) / parts;
  parallel_for(rows * parts, threads, [&](int64_t i) {
    const RowTask& task = tasks[i / parts];
    const int64_t begin = std::min(i % parts * part_size, batch.vocab);
    const int64_t end = std::min(begin + part_size, batch.vocab);
    if (task.scored != nullptr) {
      kernel.fill(*task.scored, begin, end);
    } else {
      kernel.zero(task.row, begin, end);
    }
  });
}

}  // namespace

int64_t cpu_backward(const TokenBatch& batch, const Backward& bwd, int threads) {
  check(batch, bwd);
  if (bwd.grad_dtype != batch.dtype) {
    throw std::invalid_argument("grad_dtype: the CPU kernels write the dtype of the logits");
  }
  const RowList list = list_rows(batch);
  if (list.bad_token >= 0) return list.bad_token;
  dispatch_dtype(batch.dtype, [&](auto tag) {
    backward<typename decltype(tag)::type>(batch, bwd, list, threads);
  });
  return -1;
}

}  // namespace dpo_kernels
