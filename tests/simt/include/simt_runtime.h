#pragma once
// CUDA's functions by their names: what kernels call, and the part of the runtime that launches.

#include <array>

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

inline int lane() { return machine().current->number % kWarp; }

// What every lane of the mask brings, by lane.
template <typename T>
std::array<T, kWarp> gather(unsigned mask, const Site& site, T value) {
  struct Operand {
    T value;
    std::array<T, kWarp> all;
  } mine{value, {}};
  meet(mask, site, mine, [](Operand** lanes) {
    std::array<T, kWarp> all{};
    for (int i = 0; i < kWarp; ++i) all[i] = lanes[i] ? lanes[i]->value : T{};
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i] != nullptr) lanes[i]->all = all;
    }
  });
  return mine.all;
}

template <typename T>
T exchange(unsigned mask, const Site& site, T value, int from) {
  if ((mask >> from & 1u) == 0) fail(site.words() + " reads a lane outside of its mask");
  return gather(mask, site, value)[from];
}

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
  unsigned ballot = 0;
  const auto votes = simt::gather(mask, {"__ballot_sync", file, line}, unsigned{vote != 0});
  for (int i = 0; i < simt::kWarp; ++i) ballot |= votes[i] << i;
  return ballot;
}

// --- the runtime ---------------------------------------------------------------------------------

using cudaError_t = const char*;
constexpr cudaError_t cudaSuccess = nullptr, cudaErrorInvalidValue = "invalid argument",
                      cudaErrorInvalidConfiguration = "invalid configuration argument",
                      cudaErrorInvalidDevice = "invalid device ordinal";
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace simt {

constexpr std::size_t kPlainShared = 48 << 10, kMostShared = 163 << 10;  // those of sm_80

template <typename... P>
std::size_t& allowed_shared(void (*kernel)(P...)) {
  return machine()
      .allowed_shared.try_emplace(reinterpret_cast<void*>(kernel), kPlainShared)
      .first->second;
}

template <typename... P, typename... A>
cudaError_t launch_kernel(const char* name, const cudaLaunchConfig_t* config, void (*kernel)(P...),
                          A&&... args) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> one_at_a_time(m.one_launch);
  const dim3 grid = config->gridDim, block = config->blockDim;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const bool possible = threads >= 1 && threads <= 1024 && block.z <= 64 && grid.x >= 1 &&
                        grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
                        grid.z <= 65535 && config->dynamicSmemBytes <= allowed_shared(kernel);
  if (!possible) return cudaErrorInvalidConfiguration;
  m.launches.push_back({name, grid, block, config->dynamicSmemBytes, config->stream, m.device});
  const std::tuple<std::remove_cv_t<P>...> parameters{std::forward<A>(args)...};
  run_grid(m.launches.back(), [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}

}  // namespace simt

// The launcher of csrc/cuda/launch.cuh calls it with the kernel's name in `name`.
#define cudaLaunchKernelEx(config, ...) simt::launch_kernel(name, config, __VA_ARGS__)

inline const char* cudaGetErrorString(cudaError_t error) { return error; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::machine().device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= simt::kDevices) return cudaErrorInvalidDevice;
  simt::machine().device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? simt::machine().multiprocessors
                                                       : static_cast<int>(simt::kMostShared);
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
  if (static_cast<std::size_t>(value) > simt::kMostShared) return cudaErrorInvalidValue;
  simt::allowed_shared(kernel) = static_cast<std::size_t>(value);
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...),
                                                          int threads, std::size_t shared_bytes) {
  const int by_memory = static_cast<int>((164 << 10) / (shared_bytes + 1024));
  *blocks = shared_bytes > simt::allowed_shared(kernel) ? 0 : min(by_memory, 2048 / threads);
  return cudaSuccess;
}
