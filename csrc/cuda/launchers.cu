// The CUDA half of launchers.h. Every launcher: check, device guard, stream, dispatch, launch,
// status. None allocates, synchronises or copies, so each can be captured in a CUDA graph: forward
// is a memset of its counters and a kernel, backward a kernel.
#include <cuda_runtime.h>

#include "arguments.cuh"

namespace dpo_kernels {

using namespace cuda;

namespace {

void check_cuda(cudaError_t status, const char* kernel) {
  if (status == cudaSuccess) return;
  // clears the error where it can be cleared: the next call is not to blame for it
  cudaGetLastError();
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* kernel) {
    check_cuda(cudaGetDevice(&previous_), kernel);
    if (previous_ == device) return;
    check_cuda(cudaSetDevice(device), kernel);
    switched_ = true;
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool switched_ = false;
};

int multiprocessors_of(int device, const char* kernel) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), kernel);
  return count;
}

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string cuda_device_problem(int device) {
  constexpr const char* kName = "cuda_device_problem";
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const std::string versions = "the driver is for CUDA " + version_name(driver) +
                               ", the kernels were compiled by CUDA " + version_name(runtime);
  try {
    const DeviceGuard guard(device, kName);
    cudaFuncAttributes attributes;
    // loads the kernel, or finds that no code in the binary fits the device
    check_cuda(cudaFuncGetAttributes(&attributes, forward_kernel<BFloat16, false, false>), kName);
  } catch (const std::runtime_error& error) {
    return std::string(error.what()) + "; " + versions;
  }
  return "";
}

int64_t cuda_workspace_bytes(const TokenBatch& batch) {
  check_limits(batch);
  return workspace_for(batch).bytes;
}

void cuda_forward(const TokenBatch& batch, const PairLoss* pair, const ForwardOutputs& out,
                  void* workspace, int device, void* stream) {
  constexpr const char* kName = "cuda_forward";
  check(batch, pair, out);
  check_limits(batch);
  const DeviceGuard guard(device, kName);
  const int multiprocessors = multiprocessors_of(device, kName);
  const Workspace at = workspace_for(batch);
  const ForwardParams params = make_forward(batch, pair, out, workspace, at);
  check_cuda(cudaMemsetAsync(workspace, 0, at.counter_bytes, static_cast<cudaStream_t>(stream)),
             kName);
  dispatch_dtype(batch.dtype, [&](auto element) {
    dispatch_flag(out.entropy != nullptr, [&](auto stats) {
      dispatch_flag(batch.transform.softcap != 0.0, [&](auto softcap) {
        constexpr int kThreads = threads_of(stats(), softcap());
        const int blocks = forward_blocks(batch, multiprocessors, kThreads);
        forward_kernel<decltype(element), stats(), softcap()>
            <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
      });
    });
  });
  check_cuda(cudaGetLastError(), kName);
}

void cuda_backward(const TokenBatch& batch, const Backward& bwd, int device, void* stream) {
  constexpr const char* kName = "cuda_backward";
  check(batch, bwd);
  check_limits(batch);
  if (num_tokens(batch) == 0) return;
  const DeviceGuard guard(device, kName);
  const BackwardParams params = make_backward(batch, bwd);
  const int blocks = backward_blocks(params, kBackwardThreads);
  dispatch_dtypes(batch.dtype, bwd.grad_dtype, [&](auto element, auto grad) {
    dispatch_flag(batch.transform.softcap != 0.0, [&](auto softcap) {
      backward_kernel<decltype(element), decltype(grad), softcap()>
          <<<blocks, kBackwardThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
    });
  });
  check_cuda(cudaGetLastError(), kName);
}

}  // namespace dpo_kernels
