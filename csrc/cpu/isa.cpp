#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dpo_kernels {
namespace {

bool is_supported(const Isa& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&isa == &avx512_isa()) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (&isa == &avx2_isa()) {
    // gcc 9 and 10 do not know f16c here
    unsigned a, b, c = 0, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }
#endif
  return &isa == &baseline_isa();
}

// the first one with that name, of any name when nullptr, that this machine can run
const Isa* find_isa(const char* name) {
#if defined(__x86_64__)
  const Isa* const all[] = {&avx512_isa(), &avx2_isa(), &baseline_isa()};
#else
  const Isa* const all[] = {&baseline_isa()};
#endif
  for (const Isa* isa : all) {
    if ((name == nullptr || std::strcmp(name, isa->name) == 0) && is_supported(*isa)) return isa;
  }
  return nullptr;
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

const Isa& current_isa() {
  const Isa* isa = chosen.load(std::memory_order_relaxed);
  if (isa == nullptr) {
    isa = find_isa(nullptr);
    chosen.store(isa, std::memory_order_relaxed);
  }
  return *isa;
}

const char* cpu_isa() { return current_isa().name; }

bool cpu_set_isa(const char* name) {
  const Isa* isa = find_isa(name);
  if (isa == nullptr) return false;
  chosen.store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace dpo_kernels
