// Runs a CUDA kernel on the host: a fiber per CUDA thread, an OS thread per block.
//
// A fiber runs until it meets a barrier or a warp operation and resumes when all that it waits for
// have arrived, so a schedule is repeatable and a race is not left to luck. ThreadSanitizer is told
// of each fiber and of what a barrier, a fence or an atomic orders, and of nothing else: a shuffle
// exchanges a value but orders no memory, as on the device. Shared memory is the OS thread's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

struct Index {
  unsigned x;
};

struct Lane {
  Index thread_index, block_index, block_size, grid_size;
};

Lane& current();

enum class Order : int { kForward = 0, kReversed = 1, kShuffled = 2 };

struct Launch {
  int blocks = 1;
  int threads = 32;
  Order order = Order::kForward;  // of blocks, and of fibers between two barriers
  unsigned seed = 0;
  int concurrent_blocks = 1;
};

// Returns when all blocks have. Terminates the process where a device would hang or fault: lanes of
// a warp in different operations, a barrier that not all reach, a misaligned vector.
void run(const Launch& launch, const std::function<void()>& kernel);

void sync_block(const char* file, int line);
void sync_warp(const char* file, int line);
void fence(const char* file, int line);
int atomic_add(int* p, int x);
void require_aligned(const void* p, size_t alignment);

// The synchronisation at "file.cuh:line" does nothing from now on; nullptr for none.
void drop(const char* site);
// Calls visit("file.cuh:line") for each synchronisation met so far.
void for_each_site(const std::function<void(const char*)>& visit);

// fills `all` with the values of the warp's 32 lanes, of at most 16 bytes each
void exchange_bytes(const void* value, size_t bytes, const char* operation, void* all);
int lane_in_warp();

template <class T, class Pick>
auto exchange(T x, const char* operation, Pick pick) {
  static_assert(sizeof(T) <= 16);
  T all[32];
  exchange_bytes(&x, sizeof(T), operation, all);
  return pick(static_cast<const T*>(all), lane_in_warp());
}

}  // namespace simt
