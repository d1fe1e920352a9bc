// A CUDA runtime without a device: hands every launch, memset and copy to a function of the caller.
// csrc/cuda/launchers.cu is linked with it as it is, so that its checks, its grid and its
// parameters are those that run.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>

namespace {

using OnLaunch = void (*)(const char* kernel, unsigned blocks, unsigned threads, size_t shared,
                          void** arguments);
using OnSet = void (*)(void* at, int value, size_t bytes);

OnLaunch on_launch = nullptr;
OnSet on_set = nullptr;
int multiprocessors = 1;

// kernels register themselves before any object of this file is constructed
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> map;
  return map;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed;

cudaError_t launch(const char* kernel, dim3 grid, dim3 block, void** arguments, size_t shared) {
  if (grid.y * grid.z * block.y * block.z != 1) return cudaErrorInvalidConfiguration;
  on_launch(kernel, grid.x, block.x, shared, arguments);
  return cudaSuccess;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void ptx_listen(OnLaunch launched, OnSet set) {
  on_launch = launched;
  on_set = set;
}
__attribute__((visibility("default"))) void ptx_multiprocessors(int count) {
  multiprocessors = count;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  std::memcpy(stream, &pushed.stream, sizeof pushed.stream);
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  return launch(names().at(kernel).c_str(), grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return launch(names().at(host).c_str(), grid, block, arguments, shared);
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  on_set(at, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* host) {
  return names().count(host) == 1 ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
const char* cudaGetErrorString(cudaError_t) { return "no device to ask"; }
}
