#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "../launchers.h"

namespace dpo_kernels {
namespace {

// One call of run_parallel. Every participant starts in a span of neighbouring items of its own, so
// that two threads seldom fault in the same huge page, and then helps with the others' spans.
class Job {
 public:
  Job(int64_t items, int spans, ItemFn fn, void* context)
      : spans_(spans), fn_(fn), context_(context) {
    for (int s = 0; s < spans; ++s) {
      // items / spans * s + .. instead of items * s / spans, which could overflow
      const int64_t share = items / spans, extra = items % spans;
      spans_[s].next.store(share * s + std::min<int64_t>(s, extra), std::memory_order_relaxed);
      spans_[s].end = share * (s + 1) + std::min<int64_t>(s + 1, extra);
    }
  }

  void work(int participant) {
    const int count = static_cast<int>(spans_.size());
    for (int s = 0; s < count; ++s) {
      Span& span = spans_[(participant + s) % count];
      for (;;) {
        const int64_t item = span.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= span.end) break;
        fn_(context_, item);
      }
    }
  }

  bool wants_helper() const { return joined < static_cast<int>(spans_.size()); }

  // under the pool's mutex
  int joined = 1;
  int active = 0;

 private:
  struct alignas(64) Span {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  std::vector<Span> spans_;
  ItemFn fn_;
  void* context_;
};

class Pool {
 public:
  void run(Job& job, int helpers) {
    std::list<Job*> entry = {&job};
    const auto position = entry.begin();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow_to(helpers);
      jobs_.splice(jobs_.end(), entry);
    }
    if (helpers == 1) {
      has_work_.notify_one();
    } else {
      has_work_.notify_all();
    }
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    entry.splice(entry.end(), jobs_, position);
    helper_left_.wait(lock, [&] { return job.active == 0; });
  }

 private:
  void grow_to(int workers) {
    try {
      for (; workers_ < workers; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // the system has no more threads to give: the ones there are do the work
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      const auto job =
          std::find_if(jobs_.begin(), jobs_.end(), [](Job* j) { return j->wants_helper(); });
      if (job == jobs_.end()) {
        has_work_.wait(lock);
        continue;
      }
      Job& chosen = **job;
      const int participant = chosen.joined++;
      ++chosen.active;
      lock.unlock();
      chosen.work(participant);
      lock.lock();
      if (--chosen.active == 0) helper_left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable has_work_;
  std::condition_variable helper_left_;
  std::list<Job*> jobs_;
  int workers_ = 0;
};

// Never destroyed: its workers may outlive every static object.
std::atomic<Pool*> current_pool{nullptr};

// GOMP_parallel of the OpenMP runtime that the rest of the process uses
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<OpenMpParallel> shared_openmp{nullptr};

struct OpenMpCall {
  Job& job;
  std::atomic<int> joined{0};
};

// A child of fork() has none of the workers, and mutexes in an unknown state: it forgets the pool
// and makes one of its own. OpenMP's threads are as lost, and it would wait for them for ever.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  current_pool.store(nullptr);
  shared_openmp.store(nullptr);
});

Pool& pool() {
  Pool* existing = current_pool.load(std::memory_order_acquire);
  if (existing != nullptr) return *existing;
  Pool* fresh = new Pool;
  if (current_pool.compare_exchange_strong(existing, fresh)) return *fresh;
  delete fresh;
  return *existing;
}

}  // namespace

void run_parallel(int64_t items, int threads, ItemFn fn, void* context) {
  const int spans = static_cast<int>(std::min<int64_t>(items, threads));
  if (spans <= 1) {
    for (int64_t i = 0; i < items; ++i) fn(context, i);
    return;
  }
  Job job(items, spans, fn, context);
  if (const OpenMpParallel parallel = shared_openmp.load(std::memory_order_acquire)) {
    OpenMpCall call{job};
    const auto participate = [](void* data) {
      auto& joined = *static_cast<OpenMpCall*>(data);
      joined.job.work(joined.joined.fetch_add(1, std::memory_order_relaxed));
    };
    // returns when all have; nested in another region it is this thread alone, which does it all
    parallel(participate, &call, static_cast<unsigned>(spans), 0);
    return;
  }
  pool().run(job, spans - 1);
}

void cpu_share_openmp(void* gomp_parallel) {
  shared_openmp.store(reinterpret_cast<OpenMpParallel>(gomp_parallel), std::memory_order_release);
}

}  // namespace dpo_kernels
