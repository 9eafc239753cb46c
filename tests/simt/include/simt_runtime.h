#pragma once
// CUDA's functions by their names: what kernels call, and the part of the runtime that launches.

#include "simt.h"

// --- in a kernel ---------------------------------------------------------------------------------

// The line of the call comes in by the defaults.
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_HERE) { simt::block_barrier({"__syncthreads", file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) {
  int nothing = 0;
  simt::meet(mask, {"__syncwarp", file, line}, nothing, [](int**) {});
}
namespace simt {

template <typename T>
struct Exchange {
  T value;
  int from;
  T result;
};

template <typename T>
T exchange(unsigned mask, const Site& site, T value, int from) {
  Exchange<T> mine{value, from, value};
  meet(mask, site, mine, [&](Exchange<T>** lanes) {
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1u) == 0) continue;
      const int source = lanes[i]->from;
      if ((mask >> source & 1u) == 0) fail(site.words() + " reads a lane outside of its mask");
      lanes[i]->result = lanes[source]->value;
    }
  });
  return mine.result;
}

inline int lane() { return machine().current->number % kWarp; }

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
  const int lane = simt::lane();
  return simt::exchange(mask, {"__shfl_sync", file, line}, value,
                        lane / width * width + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_HERE) {
  const int lane = simt::lane(), source = lane ^ bits;
  return simt::exchange(mask, {"__shfl_xor_sync", file, line}, value,
                        source / width > lane / width ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int vote, SIMT_HERE) {
  unsigned mine = vote != 0;
  simt::meet(mask, {"__ballot_sync", file, line}, mine, [&](unsigned** lanes) {
    unsigned ballot = 0;
    for (int i = 0; i < simt::kWarp; ++i) {
      if (mask >> i & 1u) ballot |= *lanes[i] << i;
    }
    for (int i = 0; i < simt::kWarp; ++i) {
      if (mask >> i & 1u) *lanes[i] = ballot;
    }
  });
  return mine;
}
// --- the runtime ---------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace simt {
constexpr int kPlainShared = 48 * 1024, kMostShared = 163 * 1024;  // those of sm_80

inline int allowed_shared(const void* kernel) {
  const auto found = machine().allowed_shared.find(kernel);
  return found == machine().allowed_shared.end() ? kPlainShared : found->second;
}

template <typename... P, typename... A>
cudaError_t launch_kernel(const char* name, const cudaLaunchConfig_t* config, void (*kernel)(P...),
                          A&&... args) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> one_at_a_time(m.one_launch);
  if (!is_possible(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                   allowed_shared(reinterpret_cast<const void*>(kernel)))) {
    return cudaErrorInvalidConfiguration;
  }
  m.launches.push_back({name, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                        config->stream, m.device});
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  m.threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  m.shared_bytes = config->dynamicSmemBytes;
  m.kernel_name = name;
  const std::tuple<std::remove_cv_t<P>...> parameters{std::forward<A>(args)...};
  m.kernel = [&] { std::apply(kernel, parameters); };
  run_grid();
  return cudaSuccess;
}
}  // namespace simt

// The launcher of csrc/cuda/launch.cuh calls it with the kernel's name in `name`.
#define cudaLaunchKernelEx(config, ...) simt::launch_kernel(name, config, __VA_ARGS__)

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::machine().device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= simt::machine().device_count) return cudaErrorInvalidDevice;
  simt::machine().device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? simt::machine().multiprocessors
                                                       : simt::kMostShared;
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
  if (value > simt::kMostShared) return cudaErrorInvalidValue;
  simt::machine().allowed_shared[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...),
                                                          int threads, std::size_t shared_bytes) {
  if (shared_bytes >
      static_cast<std::size_t>(simt::allowed_shared(reinterpret_cast<const void*>(kernel)))) {
    *blocks = 0;
    return cudaSuccess;
  }
  const std::size_t by_memory = (164 * 1024) / (shared_bytes + 1024);
  const std::size_t by_threads = 2048 / static_cast<std::size_t>(threads);
  *blocks = static_cast<int>(by_memory < by_threads ? by_memory : by_threads);
  return cudaSuccess;
}
