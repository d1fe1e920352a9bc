#include "simt.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define SIMT_TSAN(...) __VA_ARGS__
// the scheduler's own accesses order nothing that the device would order
#define SIMT_UNSEEN __attribute__((no_sanitize("thread")))
constexpr unsigned kNoOrder = 1;
#else
#define SIMT_TSAN(...)
#define SIMT_UNSEEN
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
#define SIMT_ASAN(...) __VA_ARGS__
#else
#define SIMT_ASAN(...)
#endif

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

[[noreturn]] void fail(const char* what, const char* detail) {
  std::fprintf(stderr, "simt: %s %s\n", what, detail);
  std::_Exit(70);
}

// A rendezvous of a fixed number of fibers, over and over.
struct Barrier {
  int expected = 0;
  int arrived = 0;
  unsigned generation = 0;
  const char* operation = nullptr;
  char order[2] = {};  // what ThreadSanitizer synchronises on, in turn
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slots[2][kWarp * 16];
};

struct Fiber {
  Lane lane;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  const Barrier* waiting = nullptr;
  unsigned awaited = 0;
  bool done = false;
  bool fenced = false;         // since its last barrier or atomic
  int* last_atomic = nullptr;  // since its last barrier
  void* tsan = nullptr;
};

struct Site {
  const char* file;
  int line;
  bool dropped;
};

constexpr int kMaxSites = 64;

struct Block {
  ucontext_t scheduler;
  Site sites[kMaxSites];
  int num_sites = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  const std::function<void()>* kernel = nullptr;
  void* tsan_scheduler = nullptr;
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
};

thread_local Block* this_block = nullptr;
thread_local Fiber* this_fiber = nullptr;

std::string dropped;
std::set<std::string> sites;
[[maybe_unused]] char launch_order, finish_order;

SIMT_UNSEEN void yield() {
  Block& block = *this_block;
  SIMT_TSAN(__tsan_switch_to_fiber(block.tsan_scheduler, kNoOrder);)
  SIMT_ASAN(void* fake = nullptr; __sanitizer_start_switch_fiber(
                this_fiber->done ? nullptr : &fake, block.scheduler_stack, block.scheduler_bytes);)
  swapcontext(&this_fiber->context, &block.scheduler);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
}

// returns the generation that was completed
SIMT_UNSEEN unsigned arrive(Barrier& barrier, const char* operation, bool orders_memory) {
  Fiber& self = *this_fiber;
  self.fenced = false;
  self.last_atomic = nullptr;
  if (barrier.arrived > 0 && std::strcmp(barrier.operation, operation) != 0) {
    fail("threads meet in different operations:", operation);
  }
  barrier.operation = operation;
  const unsigned generation = barrier.generation;
  SIMT_TSAN(if (orders_memory) __tsan_release(&barrier.order[generation % 2]);)
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    self.waiting = &barrier;
    self.awaited = generation;
    yield();
  }
  SIMT_TSAN(if (orders_memory) __tsan_acquire(&barrier.order[generation % 2]);)
  (void)orders_memory;
  return generation;
}

SIMT_UNSEEN const char* base_name(const char* file) {
  const char* name = file;
  for (; *file != 0; ++file) name = *file == '/' ? file + 1 : name;
  return name;
}

// without a lock: it would order the fibers' memory
SIMT_UNSEEN bool is_dropped(const char* file, int line) {
  Block& block = *this_block;
  const auto same = [&](const Site& site)
                        SIMT_UNSEEN { return site.line == line && site.file == file; };
  int i = 0;
  while (i < block.num_sites && !same(block.sites[i])) ++i;
  if (i == kMaxSites) fail("too many synchronisations in", file);
  if (i == block.num_sites) {
    const std::string name = std::string(base_name(file)) + ":" + std::to_string(line);
    block.sites[block.num_sites++] = {file, line, name == dropped};
  }
  return block.sites[i].dropped;
}

SIMT_UNSEEN void enter() {
  SIMT_ASAN(__sanitizer_finish_switch_fiber(nullptr, &this_block->scheduler_stack,
                                            &this_block->scheduler_bytes);)
  SIMT_TSAN(__tsan_acquire(&launch_order);)
  (*this_block->kernel)();
  SIMT_TSAN(__tsan_release(&finish_order);)
  this_fiber->done = true;
  yield();
}

SIMT_UNSEEN void resume(Block& block, Fiber& fiber) {
  this_fiber = &fiber;
  SIMT_TSAN(__tsan_switch_to_fiber(fiber.tsan, kNoOrder);)
  SIMT_ASAN(__sanitizer_start_switch_fiber(&block.fake_stack, fiber.stack.get(), kStackBytes);)
  swapcontext(&block.scheduler, &fiber.context);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(block.fake_stack, nullptr, nullptr);)
}

SIMT_UNSEEN void run_block(Block& block, const Launch& launch, int index,
                           const std::function<void()>& kernel) {
  this_block = &block;
  block.kernel = &kernel;
  block.barrier.expected = launch.threads;
  block.warps = std::vector<Warp>(launch.threads / kWarp);
  for (Warp& warp : block.warps) warp.barrier.expected = kWarp;
  block.fibers = std::vector<Fiber>(launch.threads);
  SIMT_TSAN(block.tsan_scheduler = __tsan_get_current_fiber();)
  for (int i = 0; i < launch.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.lane = {
        {unsigned(i)}, {unsigned(index)}, {unsigned(launch.threads)}, {unsigned(launch.blocks)}};
    fiber.stack = std::make_unique<unsigned char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    SIMT_TSAN(fiber.tsan = __tsan_create_fiber(0);)
  }

  std::vector<int> turn(launch.threads);
  std::iota(turn.begin(), turn.end(), 0);
  std::mt19937 random(launch.seed + index);
  if (launch.order == Order::kReversed) std::reverse(turn.begin(), turn.end());
  for (int left = launch.threads; left > 0;) {
    if (launch.order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), random);
    bool moved = false;
    for (const int i : turn) {
      Fiber& fiber = block.fibers[i];
      if (fiber.done) continue;
      if (fiber.waiting != nullptr && fiber.waiting->generation == fiber.awaited) continue;
      fiber.waiting = nullptr;
      moved = true;
      resume(block, fiber);
      left -= fiber.done;
    }
    if (!moved)
      fail("a barrier is not reached by all threads:",
           block.barrier.operation ? block.barrier.operation : "warp");
  }
  this_block = nullptr;
}

}  // namespace

SIMT_UNSEEN Lane& current() { return this_fiber->lane; }

SIMT_UNSEEN int lane_in_warp() { return static_cast<int>(this_fiber->lane.thread_index.x % kWarp); }

void run(const Launch& launch, const std::function<void()>& kernel) {
  std::vector<int> order(launch.blocks);
  std::iota(order.begin(), order.end(), 0);
  if (launch.order == Order::kReversed) std::reverse(order.begin(), order.end());
  if (launch.order == Order::kShuffled) {
    std::shuffle(order.begin(), order.end(), std::mt19937(launch.seed));
  }
  SIMT_TSAN(__tsan_release(&launch_order);)
  // they outlive the launch, as freeing one earlier would race with what its fibers did
  std::vector<std::unique_ptr<Block>> blocks;
  // an OS thread a block: shared memory is thread-local, and no block orders another's accesses
  for (size_t next = 0; next < order.size();) {
    std::vector<std::thread> resident;
    for (int i = 0; i < launch.concurrent_blocks && next < order.size(); ++i, ++next) {
      blocks.push_back(std::make_unique<Block>());
      resident.emplace_back(run_block, std::ref(*blocks.back()), std::cref(launch), order[next],
                            std::cref(kernel));
    }
    for (std::thread& block : resident) block.join();
  }
  SIMT_TSAN(__tsan_acquire(&finish_order);)
  for (const auto& block : blocks) {
    for (int i = 0; i < block->num_sites; ++i) {
      const Site& site = block->sites[i];
      sites.insert(std::string(base_name(site.file)) + ":" + std::to_string(site.line));
    }
  }
  SIMT_TSAN(for (auto& block : blocks) for (Fiber& f : block->fibers) __tsan_destroy_fiber(f.tsan);)
}

SIMT_UNSEEN void sync_block(const char* file, int line) {
  if (!is_dropped(file, line)) arrive(this_block->barrier, "__syncthreads", true);
}

SIMT_UNSEEN void sync_warp(const char* file, int line) {
  if (is_dropped(file, line)) return;
  arrive(this_block->warps[this_fiber->lane.thread_index.x / kWarp].barrier, "__syncwarp", true);
}

// a fence orders what precedes it before the thread's next atomic, and what follows it behind the
// atomics that its last one has seen
SIMT_UNSEEN void fence(const char* file, int line) {
  if (is_dropped(file, line)) return;
  if (this_fiber->last_atomic != nullptr)
    __atomic_load_n(this_fiber->last_atomic, __ATOMIC_ACQUIRE);
  SIMT_TSAN(if (this_fiber->last_atomic != nullptr) __tsan_acquire(this_fiber->last_atomic);)
  this_fiber->fenced = true;
}

int atomic_add(int* p, int x) {
  Fiber& self = *this_fiber;
  const bool release = self.fenced;
  self.fenced = false;
  self.last_atomic = p;
  return release ? __atomic_fetch_add(p, x, __ATOMIC_RELEASE)
                 : __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}

void require_aligned(const void* p, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("misaligned", "vector access");
}

SIMT_UNSEEN void exchange_bytes(const void* value, size_t bytes, const char* operation, void* all) {
  Warp& warp = this_block->warps[this_fiber->lane.thread_index.x / kWarp];
  // two buffers: nobody reaches the next but one exchange before all have left this one
  unsigned char* const slots = warp.slots[warp.barrier.generation % 2];
  const unsigned char* const from = static_cast<const unsigned char*>(value);
  for (size_t i = 0; i < bytes; ++i) slots[lane_in_warp() * bytes + i] = from[i];
  arrive(warp.barrier, operation, false);
  unsigned char* const to = static_cast<unsigned char*>(all);
  for (size_t i = 0; i < kWarp * bytes; ++i) to[i] = slots[i];
}

void drop(const char* site) { dropped = site == nullptr ? "" : site; }

void for_each_site(const std::function<void(const char*)>& visit) {
  for (const std::string& site : sites) visit(site.c_str());
}

}  // namespace simt
