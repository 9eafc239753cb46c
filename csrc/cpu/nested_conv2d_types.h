#pragma once
// From a dtype of the binding to the element type of a kernel.

#include "cpu/vec.h"
#include "pyeff/tensor_view.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Calls f with a value of the element type; the binding lets no integer tensor through.
template <typename F>
void for_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat16:
      return f(Float16{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kInt32:
    case Dtype::kInt64:
      return;
  }
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
