#pragma once
// Checked launches: the one way to run a kernel.

#include <cstddef>
#include <string>

#include "cuda/common.cuh"

namespace pyeff::cuda {

// What a kernel may have without asking.
constexpr std::size_t kPlainSharedBytes = 48 * 1024;

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// The most shared memory that a block of the current device can have, in bytes.
inline std::size_t most_shared_bytes() {
  return static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

template <typename... P>
void allow_shared(const char* name, void (*kernel)(P...), std::size_t shared_bytes) {
  if (shared_bytes <= kPlainSharedBytes) return;
  // Always all there is: the attribute is the kernel's, and what another thread asked for a smaller
  // launch must not stand in the way of this one.
  const std::size_t most = most_shared_bytes();
  const cudaError_t status =
      shared_bytes > most
          ? cudaErrorInvalidValue
          : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(most));
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, not left for the next call
  throw std::runtime_error(std::string(name) + ": launch failed (shared memory " +
                           std::to_string(shared_bytes) + " bytes): " + cudaGetErrorString(status));
}

inline std::string launch_words(dim3 grid, dim3 block, std::size_t shared_bytes) {
  const auto triple = [](dim3 size) {
    return "[" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " +
           std::to_string(size.z) + "]";
  };
  return "grid " + triple(grid) + ", block " + triple(block) + ", shared memory " +
         std::to_string(shared_bytes) + " bytes";
}

// Runs kernel(args...) on the stream; the arguments become the kernel's own types.
template <typename... P, typename... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
            void* stream, const A&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for every parameter");
  allow_shared(name, kernel, shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(name) + ": launch failed (" +
                           launch_words(grid, block, shared_bytes) +
                           "): " + cudaGetErrorString(status));
}

// How many blocks of the kernel the current device holds at a time, at least one.
template <typename... P>
int resident_blocks(const char* name, void (*kernel)(P...), int threads, std::size_t shared_bytes) {
  allow_shared(name, kernel, shared_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
        name);
  return blocks < 1 ? 1 : blocks * multiprocessors();
}

}  // namespace pyeff::cuda
