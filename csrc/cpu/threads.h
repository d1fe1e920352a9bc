// Threads: those of an OpenMP runtime that the caller shares (cpu_share_openmp), or a pool of our
// own, so that the binary depends on no such runtime.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dpo_kernels {

using ItemFn = void (*)(void* context, int64_t item);

// Runs fn(context, i) once for every i in [0, items) on at most `threads` threads, the caller
// included, and returns when all are done. fn must not throw. Calls from several threads share the
// pool's workers; a caller that gets none does all of its work itself.
void run_parallel(int64_t items, int threads, ItemFn fn, void* context);

template <class Fn>
void parallel_for(int64_t items, int threads, Fn&& fn) {
  run_parallel(
      items, threads,
      [](void* context, int64_t item) {
        (*static_cast<std::remove_reference_t<Fn>*>(context))(item);
      },
      &fn);
}

}  // namespace dpo_kernels
