// The extension module: one bind_<subject> per file, nothing else.
#include <pybind11/pybind11.h>

namespace pyeff::bindings {
void bind_branch_conv2d(pybind11::module_& m);
void bind_branch_stage(pybind11::module_& m);
void bind_combine(pybind11::module_& m);
void bind_call_key(pybind11::module_& m);
void bind_factorized_conv2d(pybind11::module_& m);
void bind_info(pybind11::module_& m);
void bind_nested_conv2d(pybind11::module_& m);
void bind_sampler_conv2d(pybind11::module_& m);
void bind_top_k_routes(pybind11::module_& m);
}  // namespace pyeff::bindings

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyeff native kernels. Use pyeff.ops, not this module.";
  pyeff::bindings::bind_branch_conv2d(m);
  pyeff::bindings::bind_branch_stage(m);
  pyeff::bindings::bind_combine(m);
  pyeff::bindings::bind_call_key(m);
  pyeff::bindings::bind_factorized_conv2d(m);
  pyeff::bindings::bind_info(m);
  pyeff::bindings::bind_nested_conv2d(m);
  pyeff::bindings::bind_sampler_conv2d(m);
  pyeff::bindings::bind_top_k_routes(m);
}
