// What a kernel call depends on apart from the numbers in its tensors, as a key for a dictionary.
#include <array>

#include "bindings/tensor_arg.h"

namespace pyeff::bindings {
namespace {

constexpr std::size_t kTensors = 3;
using Key = std::array<std::int64_t, kTensors * (1 + TensorView::kMaxDims)>;

std::size_t append(py::handle tensor, Key& key, std::size_t length) {
  if (tensor.is_none()) {
    key[length] = -1;
    return length + 1;
  }
  const TensorArg view(tensor, "tensor");
  key[length++] = (std::int64_t{view->device_index} << 24) |
                  (static_cast<int>(view->device) << 16) | (static_cast<int>(view->dtype) << 8) |
                  view->ndim;
  for (int d = 0; d < view->ndim; ++d) key[length++] = view->shape[d];
  return length;
}

// Asking the tensors from Python makes an object for every answer, which costs twice as much.
py::bytes call_key(py::handle x, py::handle weight, py::handle bias) {
  Key key;
  std::size_t length = append(x, key, 0);
  length = append(weight, key, length);
  length = append(bias, key, length);
  return {reinterpret_cast<const char*>(key.data()), length * sizeof(key[0])};
}

}  // namespace

void bind_call_key(py::module_& m) {
  m.def("call_key", &call_key, py::arg("x"), py::arg("weight"), py::arg("bias"),
        "A key of the dtypes, devices and shapes of three tensors, each of which may be None.");
}

}  // namespace pyeff::bindings
