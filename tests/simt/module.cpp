// The operators' bindings over kernels that run on the host, and what was launched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/dlpack.h"
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
  for (const simt::Launch& record : simt::machine().launches) {
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

// A tensor that says that it is on a device of another number.
struct Elsewhere {
  py::object tensor;
  int device;
};

constexpr const char* kApi = "__dlpack_c_exchange_api__";
constexpr const char* kApiName = "dlpack_exchange_api";

int tensor_from_elsewhere(void* object, pyeff::dlpack::Tensor* out) {
  const auto& self = py::handle(static_cast<PyObject*>(object)).cast<const Elsewhere&>();
  const py::object capsule = py::type::of(self.tensor).attr(kApi);
  const auto* api = static_cast<const pyeff::dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), kApiName));
  const int status = api->tensor_from_object(self.tensor.ptr(), out);
  out->device.index = self.device;
  return status;
}

void bind_elsewhere(py::module_& m) {
  static const pyeff::dlpack::ExchangeApi api{
      {pyeff::dlpack::kMajorVersion, 0}, nullptr, nullptr, nullptr, nullptr,
      tensor_from_elsewhere,             nullptr};
  py::class_<Elsewhere> type(m, "Elsewhere", py::module_local());
  type.def(py::init<py::object, int>(), py::arg("tensor"), py::arg("device"));
  type.attr(kApi) = py::capsule(&api, kApiName);
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
  bind_elsewhere(m);
  m.def("launches", &launches, "Every launch since forget_launches, in order.");
  m.def("forget_launches", [] { simt::machine().launches.clear(); });
  m.def(
      "set_reverse", [](bool reverse) { simt::machine().reverse = reverse; },
      "Whether the last block, warp and lane go first.");
  m.def(
      "set_multiprocessors", [](int count) { simt::machine().multiprocessors = count; },
      "How many of them the device says it has.");
}
