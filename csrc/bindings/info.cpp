// What was built and what this machine can run.
#include <pybind11/stl.h>

#include "bindings/integer_arg.h"
#include "cpu/fma_peak.h"
#include "cpu/isa.h"
#include "pyeff/config.h"
#include "pyeff/device.h"

namespace pyeff::bindings {
namespace {

py::dict cuda_info() {
  py::dict info;
  info["built"] = kWithCuda;
  info["architectures"] = py::list();
  info["runtime_version"] = py::none();
  info["devices"] = py::list();
  info["error"] = py::none();
  if constexpr (kWithCuda) {
    info["architectures"] = py::str(kCudaArchitectures).attr("split")();
    info["runtime_version"] = cuda::runtime_version();
    const cuda::DeviceQuery query = cuda::query_devices();
    py::list devices;
    for (const cuda::DeviceInfo& device : query.devices) {
      py::dict entry;
      entry["name"] = device.name;
      entry["compute_capability"] = device.compute_capability;
      entry["memory_bytes"] = device.memory_bytes;
      entry["multiprocessors"] = device.multiprocessors;
      devices.append(entry);
    }
    info["devices"] = devices;
    if (!query.error.empty()) info["error"] = query.error;
  }
  return info;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

}  // namespace

void bind_info(py::module_& m) {
  m.attr("version") = kVersion;
  m.attr("compiler") = kCompiler;
  m.def("cuda_info", &cuda_info, "CUDA kernels in this build, and the devices that it sees.");
  m.def("isa", [] { return cpu::isa_name(cpu::isa()); }, "The instruction set in use.");
  m.def(
      "run_fma_loop",
      [](std::int64_t repeats, std::int64_t threads_) {
        constexpr const char* op = "run_fma_loop";
        if (repeats < 1) fail(op, "repeats must be at least 1, got " + std::to_string(repeats));
        const int threads = read_threads(op, threads_);
        const py::gil_scoped_release no_gil;
        return cpu::run_fma_loop(repeats, threads);
      },
      py::arg("repeats"), py::arg("threads"),
      "Multiply-adds in registers only; returns the floating-point operations done.");
  m.def("available_isas", &available_isas, "Instruction sets that can be forced, best last.");
  m.def(
      "force_isa",
      [](const std::optional<std::string>& name) {
        if (name) {
          cpu::force_isa(cpu::isa_from_name(*name));
        } else {
          cpu::unforce_isa();
        }
      },
      py::arg("name"), "Uses this instruction set until None is given.");
}

}  // namespace pyeff::bindings
