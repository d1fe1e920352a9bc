#include "driver.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "../../csrc/cuda/arguments.cuh"

namespace dpo_kernels::simt_driver {
namespace {

// the sanitizers' program needs one element type, and is built three times as fast with one
template <class Visit>
void dispatch(DType dtype, DType grad_dtype, bool softcap, Visit visit) {
#ifdef SIMT_FLOAT32_ONLY
  visit(cuda::Float32{}, cuda::Float32{}, std::false_type{});
#else
  cuda::dispatch_dtypes(dtype, grad_dtype, [&](auto element, auto grad) {
    cuda::dispatch_flag(softcap, [&](auto flag) { visit(element, grad, flag); });
  });
#endif
}

}  // namespace

int64_t workspace_bytes(const TokenBatch& batch) {
  check(batch);
  cuda::check_limits(batch);
  return cuda::workspace_for(batch).bytes;
}

void forward(const TokenBatch& batch, const PairLoss* pair, const ForwardOutputs& out,
             void* workspace, const simt::Launch& launch) {
  check(batch, pair, out);
  cuda::check_limits(batch);
  const cuda::Workspace at = cuda::workspace_for(batch);
  const cuda::ForwardParams params = cuda::make_forward(batch, pair, out, workspace, at);
  std::memset(workspace, 0, at.counter_bytes);
  simt::Launch grid = launch;
  grid.blocks = cuda::forward_blocks(batch, launch.blocks, launch.threads);
  const bool softcap = batch.transform.softcap != 0.0;
  dispatch(batch.dtype, batch.dtype, softcap, [&](auto element, auto, auto capped) {
    cuda::dispatch_flag(out.entropy != nullptr, [&](auto stats) {
      simt::run(grid, [&] {
        cuda::forward_kernel<decltype(element), decltype(stats)::value, decltype(capped)::value>(
            params);
      });
    });
  });
}

void backward(const TokenBatch& batch, const Backward& bwd, const simt::Launch& launch) {
  check(batch, bwd);
  cuda::check_limits(batch);
  if (num_tokens(batch) == 0) return;
  const cuda::BackwardParams params = cuda::make_backward(batch, bwd);
  simt::Launch grid = launch;
  grid.blocks = cuda::backward_blocks(params, launch.threads);
  const bool softcap = batch.transform.softcap != 0.0;
  dispatch(batch.dtype, bwd.grad_dtype, softcap, [&](auto element, auto grad, auto capped) {
    simt::run(grid, [&] {
      cuda::backward_kernel<decltype(element), decltype(grad), decltype(capped)::value>(params);
    });
  });
}

}  // namespace dpo_kernels::simt_driver

namespace {

thread_local std::string last_error;

template <class Call>
int guarded(Call call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {

const char* simt_last_error() { return last_error.c_str(); }

int simt_workspace_bytes(const dpo_kernels::TokenBatch* batch, int64_t* bytes) {
  return guarded([&] { *bytes = dpo_kernels::simt_driver::workspace_bytes(*batch); });
}

int simt_forward(const dpo_kernels::TokenBatch* batch, const dpo_kernels::PairLoss* pair,
                 const dpo_kernels::ForwardOutputs* out, void* workspace,
                 const simt::Launch* launch) {
  return guarded(
      [&] { dpo_kernels::simt_driver::forward(*batch, pair, *out, workspace, *launch); });
}

int simt_backward(const dpo_kernels::TokenBatch* batch, const dpo_kernels::Backward* bwd,
                  const simt::Launch* launch) {
  return guarded([&] { dpo_kernels::simt_driver::backward(*batch, *bwd, *launch); });
}
}
