#pragma once
// Checks that every binding of a CUDA kernel shares.

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "bindings/tensor_arg.h"
#include "pyeff/config.h"

namespace pyeff::bindings {

// All on one GPU, that of the first.
inline void require_on_gpu(const char* op, std::initializer_list<const TensorView*> tensors) {
  if constexpr (!kWithCuda) {
    throw std::runtime_error(std::string(op) +
                             ": backend cuda is not in this build of pyeff; build it where nvcc is "
                             "on PATH (pyeff.info() says what it found)");
  }
  const TensorView& first = **tensors.begin();
  for (const TensorView* t : tensors) {
    if (t->device != Device::kCuda) fail(op, std::string(t->name) + " must be on a GPU");
    if (t->device_index != first.device_index) {
      fail(op, std::string(t->name) + " must be on the device of " + first.name);
    }
  }
}

[[noreturn]] inline void fail_not_implemented(const char* op, const std::string& what) {
  PyErr_SetString(PyExc_NotImplementedError, (std::string(op) + ": backend cuda: " + what).c_str());
  throw py::error_already_set();
}

}  // namespace pyeff::bindings
