#include "pyeff/device.h"

#include "cuda/common.cuh"

namespace pyeff::cuda {

DeviceQuery query_devices() {
  DeviceQuery query;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    query.error = cudaGetErrorString(status);
    cudaGetLastError();  // a missing driver is an answer here, not an error left for the next call
    return query;
  }
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
    query.devices.push_back({properties.name, 10 * properties.major + properties.minor,
                             properties.totalGlobalMem, properties.multiProcessorCount});
  }
  if (query.devices.empty()) query.error = "no CUDA device";
  return query;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

}  // namespace pyeff::cuda
