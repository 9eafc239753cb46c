#include "pyeff/top_k_routes.h"

#include "bindings/branch_arg.h"

namespace pyeff::bindings {
namespace {

void routes(py::handle scores_, py::handle index_) {
  constexpr const char* op = "top_k_routes";
  const TensorArg scores(scores_, "scores"), index(index_, "index");
  require_index(op, index);
  require_on_cpu(op, scores);
  if (scores->ndim != 2) fail(op, "scores must have 2 dimensions [N, B]");
  if (!is_floating_point(scores->dtype)) fail(op, "scores must be a floating-point tensor");
  if (index->shape[0] != scores->shape[0]) fail(op, "index must have a row for each of scores");
  if (index->shape[1] > scores->shape[1]) {
    fail(op, "k must be at most the number of branches " + std::to_string(scores->shape[1]) +
                 ", got " + std::to_string(index->shape[1]));
  }
  const py::gil_scoped_release no_gil;
  cpu::top_k_routes(scores, index);
}

}  // namespace

void bind_top_k_routes(py::module_& m) {
  m.def("top_k_routes", &routes, py::arg("scores"), py::arg("index"),
        "Writes the numbers of the k highest scores of each row. See pyeff.ops.top_k_routes.");
}

}  // namespace pyeff::bindings
