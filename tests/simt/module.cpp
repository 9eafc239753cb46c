// The operators' bindings over kernels that run on the host, and what was launched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt.h"

namespace py = pybind11;

// Weak: a module holds the operators that it was linked with.
#define SIMT_OPTIONAL __attribute__((weak))
namespace pyeff::bindings {
SIMT_OPTIONAL void bind_branch_conv2d(py::module_& m);
SIMT_OPTIONAL void bind_branch_stage(py::module_& m);
SIMT_OPTIONAL void bind_combine(py::module_& m);
SIMT_OPTIONAL void bind_factorized_conv2d(py::module_& m);
SIMT_OPTIONAL void bind_nested_conv2d(py::module_& m);
SIMT_OPTIONAL void bind_probe(py::module_& m);
SIMT_OPTIONAL void bind_top_k_routes(py::module_& m);
}  // namespace pyeff::bindings

namespace {

py::list launches() {
  const auto triple = [](dim3 size) { return py::make_tuple(size.x, size.y, size.z); };
  py::list list;
  for (const simt::LaunchRecord& record : simt::machine().launches) {
    py::dict entry;
    entry["name"] = record.name;
    entry["grid"] = triple(record.grid);
    entry["block"] = triple(record.block);
    entry["shared_bytes"] = record.shared_bytes;
    entry["stream"] = reinterpret_cast<std::uintptr_t>(record.stream);
    entry["device"] = record.device;
    list.append(entry);
  }
  return list;
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  using pyeff::bindings::bind_branch_conv2d;
  using pyeff::bindings::bind_branch_stage;
  using pyeff::bindings::bind_combine;
  using pyeff::bindings::bind_factorized_conv2d;
  using pyeff::bindings::bind_nested_conv2d;
  using pyeff::bindings::bind_probe;
  using pyeff::bindings::bind_top_k_routes;
  for (const auto bind :
       {bind_branch_conv2d, bind_branch_stage, bind_combine, bind_factorized_conv2d,
        bind_nested_conv2d, bind_probe, bind_top_k_routes}) {
    if (bind != nullptr) bind(m);
  }
  m.def("launches", &launches, "Every launch since forget_launches, in order.");
  m.def("forget_launches", [] { simt::machine().launches.clear(); });
  m.def(
      "set_reverse", [](bool reverse) { simt::machine().reverse = reverse; },
      "Whether the last block, warp and lane go first.");
  m.def(
      "set_multiprocessors", [](int count) { simt::machine().multiprocessors = count; },
      "How many of them the device says it has.");
}
