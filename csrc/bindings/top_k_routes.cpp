#include "pyeff/top_k_routes.h"

#include "bindings/branch_arg.h"
#include "bindings/gpu_arg.h"

namespace pyeff::bindings {
namespace {

void check_scores(const char* op, const TensorView& scores, const TensorView& index) {
  if (scores.ndim != 2) fail(op, "scores must have 2 dimensions [N, B]");
  if (!is_floating_point(scores.dtype)) fail(op, "scores must be a floating-point tensor");
  if (index.shape[0] != scores.shape[0]) fail(op, "index must have a row for each of scores");
  if (index.shape[1] > scores.shape[1]) {
    fail(op, "k must be at most the number of branches " + std::to_string(scores.shape[1]) +
                 ", got " + std::to_string(index.shape[1]));
  }
}

void routes(py::handle scores_, py::handle index_) {
  constexpr const char* op = "top_k_routes";
  const TensorArg scores(scores_, "scores"), index(index_, "index");
  require_index(op, index);
  require_on_cpu(op, scores);
  check_scores(op, scores, index);
  const py::gil_scoped_release no_gil;
  cpu::top_k_routes(scores, index);
}

// --- CUDA ----------------------------------------------------------------------------------------

// [N, k] beside the index, in the dtype and on the device of `ref`.
void require_shares(const char* op, const TensorView& t, const TensorView& index,
                    const TensorView& ref) {
  require_shape(op, t, {index.shape[0], index.shape[1]});
  require_contiguous(op, t);
  require_like(op, t, ref);
}

void routes_cuda(py::handle scores_, py::handle index_, py::handle weight_, bool softmax) {
  constexpr const char* op = "top_k_routes";
  const TensorArg scores(scores_, "scores"), index(index_, "index"), weight(weight_, "weight");
  require_routes(op, index);
  check_scores(op, scores, index);
  require_shares(op, weight, index, scores);
  require_on_gpu(op, {&*scores, &*index});
  require_countable(op, "branches", scores->shape[1]);
  if constexpr (kWithCuda) {
    void* stream = scores.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::top_k_routes(scores, index, weight, softmax, stream);
  }
}

void grad_cuda(py::handle grad_weight_, py::handle index_, py::handle weight_,
               py::handle grad_scores_) {
  constexpr const char* op = "top_k_routes_grad";
  const TensorArg grad_weight(grad_weight_, "grad_weight"), index(index_, "index");
  const TensorArg weight(weight_, "weight"), grad_scores(grad_scores_, "grad_scores");
  require_routes(op, index);
  if (!is_floating_point(weight->dtype)) fail(op, "weight must be a floating-point tensor");
  require_shares(op, weight, index, weight);
  require_shares(op, grad_weight, index, weight);
  if (grad_scores->ndim != 2 || grad_scores->shape[0] != index->shape[0]) {
    fail(op, "grad_scores must be [N, B] with a row for each of index");
  }
  require_contiguous(op, grad_scores);
  require_like(op, grad_scores, weight);
  require_on_gpu(op, {&*weight, &*index});
  if constexpr (kWithCuda) {
    void* stream = weight.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::top_k_routes_grad(grad_weight, index, weight, grad_scores, stream);
  }
}

void plan_cuda(py::handle index_, py::handle order_, py::handle offsets_) {
  constexpr const char* op = "branch_plan";
  const TensorArg index(index_, "index"), order(order_, "order"), offsets(offsets_, "offsets");
  require_routes(op, index);
  if (offsets->ndim != 1 || offsets->shape[0] < 1) fail(op, "offsets must be [B + 1]");
  require_plan(op, order, offsets, index->shape[0] * index->shape[1], offsets->shape[0] - 1);
  require_on_gpu(op, {&*index, &*order, &*offsets});
  if constexpr (kWithCuda) {
    if (offsets->shape[0] - 1 > cuda::branch_plan_most_branches()) {
      fail_not_implemented(
          op, "branches must be at most " + std::to_string(cuda::branch_plan_most_branches()));
    }
    void* stream = index.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::branch_plan(index, order, offsets, stream);
  }
}

}  // namespace

void bind_top_k_routes(py::module_& m) {
  m.def("top_k_routes", &routes, py::arg("scores"), py::arg("index"),
        "Writes the numbers of the k highest scores of each row. See pyeff.ops.top_k_routes.");
  m.def("top_k_routes_cuda", &routes_cuda, py::arg("scores"), py::arg("index"), py::arg("weight"),
        py::arg("softmax"), "Writes the routes and their weight; NaN counts as the lowest score.");
  m.def("top_k_routes_grad_cuda", &grad_cuda, py::arg("grad_weight"), py::arg("index"),
        py::arg("weight"), py::arg("grad_scores"), "Writes the gradient of the softmax's scores.");
  m.def("branch_plan_cuda", &plan_cuda, py::arg("index"), py::arg("order"), py::arg("offsets"),
        "Writes the pairs by branch, and where those of each branch begin.");
}

}  // namespace pyeff::bindings
