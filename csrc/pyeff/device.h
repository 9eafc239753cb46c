#pragma once
// What GPU this process could use, asked without a CUDA context or a driver being there.

#include <string>
#include <vector>

namespace pyeff::cuda {

struct DeviceInfo {
  std::string name;
  int compute_capability;  // 10 * major + minor
  std::size_t memory_bytes;
  int multiprocessors;
};

struct DeviceQuery {
  std::vector<DeviceInfo> devices;
  std::string error;  // why there are none, in CUDA's words; empty if there are some
};

DeviceQuery query_devices();
int runtime_version();  // of the CUDA runtime that is linked in, 1000 * major + 10 * minor

}  // namespace pyeff::cuda
