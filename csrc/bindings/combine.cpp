#include "pyeff/combine.h"

#include "bindings/branch_arg.h"
#include "bindings/gpu_arg.h"
#include "pyeff/branch_conv2d.h"

namespace pyeff::bindings {
namespace {

// [N, k, F], the features side by side.
void require_rows(const char* op, const TensorView& t, const TensorView& index,
                  const TensorView& projection) {
  require_shape(op, t, {index.shape[0], index.shape[1], projection.shape[2]});
  if (t.shape[2] > 1 && t.stride[2] != 1 && t.shape[0] > 0) {
    fail(op, std::string(t.name) + " must have its features side by side");
  }
  require_like(op, t, projection);
}

void require_dense(const char* op, const TensorView& t, std::initializer_list<std::int64_t> shape,
                   const TensorView& projection) {
  require_shape(op, t, shape);
  require_contiguous(op, t);
  require_like(op, t, projection);
}

// What every direction has in common; `projection` is its gradient in one of them.
struct Call {
  Call(const char* op, py::handle projection_, const char* projection_name, py::handle y_,
       py::handle index_, py::handle route_weight_)
      : projection(projection_, projection_name),
        y(y_, "y"),
        index(index_, "routes.index"),
        route_weight(route_weight_, "routes.weight") {
    if (projection->ndim != 3) {
      fail(op, std::string(projection_name) + " must have 3 dimensions [B, O, F]");
    }
    if (!is_floating_point(projection->dtype)) {
      fail(op, std::string(projection_name) + " must be a floating-point tensor");
    }
    require_contiguous(op, projection);
    require_routes(op, index);
    require_rows(op, y, index, projection);
    require_dense(op, route_weight, {index->shape[0], index->shape[1]}, projection);
  }

  void require_output(const char* op, const TensorView& out) const {
    require_dense(op, out, {index->shape[0], projection->shape[1]}, projection);
  }

  TensorArg projection, y, index, route_weight;
};

struct CpuCall : Call {
  CpuCall(const char* op, py::handle projection_, const char* projection_name, py::handle y_,
          py::handle index_, py::handle route_weight_, std::int64_t threads_)
      : Call(op, projection_, projection_name, y_, index_, route_weight_),
        threads(read_threads(op, threads_)) {
    require_on_cpu(op, projection);
    require_on_cpu(op, index);
    require_branches(op, index, projection->shape[0]);
  }

  int threads;
};

// The gradients of y and of the routes' weight, either of which may be missing.
struct InputGradients {
  InputGradients(const char* op, const Call& call, py::handle grad_y_,
                 py::handle grad_route_weight_)
      : y(optional_tensor(grad_y_, "grad_y")),
        route_weight(optional_tensor(grad_route_weight_, "grad_route_weight")) {
    if (y) require_rows(op, *y, call.index, call.projection);
    if (route_weight) {
      require_dense(op, *route_weight, {call.index->shape[0], call.index->shape[1]},
                    call.projection);
    }
  }

  std::optional<TensorArg> y, route_weight;
};

void forward(py::handle y, py::handle projection, py::handle packed_, py::handle bias_,
             py::handle index, py::handle route_weight, py::handle out_, std::int64_t threads) {
  constexpr const char* op = "combine";
  const CpuCall call(op, projection, "projection", y, index, route_weight, threads);
  const TensorArg out(out_, "out");
  const auto packed = optional_tensor(packed_, "packed"), bias = optional_tensor(bias_, "bias");
  call.require_output(op, out);
  if (bias) require_dense(op, **bias, {call.projection->shape[1]}, call.projection);
  if (packed) {
    TensorView weight = call.projection;
    weight.ndim = 5;
    weight.shape[3] = weight.shape[4] = 1;
    require_packed(op, **packed, weight, cpu::branch_conv2d_packed_elements(weight, 1));
  }
  const py::gil_scoped_release no_gil;
  cpu::combine_forward(call.y, call.projection, view_or_null(packed), view_or_null(bias),
                       call.index, call.route_weight, out, call.threads);
}

void grad_input(py::handle grad_out_, py::handle y, py::handle projection, py::handle index,
                py::handle route_weight, py::handle grad_y_, py::handle grad_route_weight_,
                std::int64_t threads) {
  constexpr const char* op = "combine_grad_input";
  const CpuCall call(op, projection, "projection", y, index, route_weight, threads);
  const TensorArg grad_out(grad_out_, "grad_out");
  const InputGradients gradients(op, call, grad_y_, grad_route_weight_);
  call.require_output(op, grad_out);
  const py::gil_scoped_release no_gil;
  cpu::combine_grad_input(grad_out, call.y, call.projection, call.index, call.route_weight,
                          view_or_null(gradients.y), view_or_null(gradients.route_weight),
                          call.threads);
}

void grad_projection(py::handle grad_out_, py::handle y, py::handle index, py::handle route_weight,
                     py::handle grad_projection_, std::int64_t threads) {
  constexpr const char* op = "combine_grad_projection";
  const CpuCall call(op, grad_projection_, "grad_projection", y, index, route_weight, threads);
  const TensorArg grad_out(grad_out_, "grad_out");
  call.require_output(op, grad_out);
  const py::gil_scoped_release no_gil;
  cpu::combine_grad_projection(grad_out, call.y, call.index, call.route_weight, call.projection,
                               call.threads);
}

// --- CUDA ----------------------------------------------------------------------------------------

void forward_cuda(py::handle y, py::handle projection, py::handle bias_, py::handle index,
                  py::handle route_weight, py::handle out_) {
  constexpr const char* op = "combine";
  const Call call(op, projection, "projection", y, index, route_weight);
  const TensorArg out(out_, "out");
  const auto bias = optional_tensor(bias_, "bias");
  call.require_output(op, out);
  if (bias) require_dense(op, **bias, {call.projection->shape[1]}, call.projection);
  require_on_gpu(op, {&*call.y, &*call.index});
  if constexpr (kWithCuda) {
    void* stream = call.y.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::combine_forward(call.y, call.projection, view_or_null(bias), call.index,
                          call.route_weight, out, stream);
  }
}

void grad_input_cuda(py::handle grad_out_, py::handle y, py::handle projection, py::handle index,
                     py::handle route_weight, py::handle grad_y_, py::handle grad_route_weight_) {
  constexpr const char* op = "combine_grad_input";
  const Call call(op, projection, "projection", y, index, route_weight);
  const TensorArg grad_out(grad_out_, "grad_out");
  const InputGradients gradients(op, call, grad_y_, grad_route_weight_);
  call.require_output(op, grad_out);
  require_on_gpu(op, {&*call.y, &*call.index});
  if constexpr (kWithCuda) {
    void* stream = call.y.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::combine_grad_input(grad_out, call.y, call.projection, call.index, call.route_weight,
                             view_or_null(gradients.y), view_or_null(gradients.route_weight),
                             stream);
  }
}

void grad_projection_cuda(py::handle grad_out_, py::handle y, py::handle index, py::handle order_,
                          py::handle offsets_, py::handle route_weight,
                          py::handle grad_projection_) {
  constexpr const char* op = "combine_grad_projection";
  const Call call(op, grad_projection_, "grad_projection", y, index, route_weight);
  const TensorArg grad_out(grad_out_, "grad_out"), order(order_, "order");
  const TensorArg offsets(offsets_, "offsets");
  call.require_output(op, grad_out);
  require_plan(op, order, offsets, call.index->shape[0] * call.index->shape[1],
               call.projection->shape[0]);
  require_on_gpu(op, {&*call.y, &*call.index, &*order, &*offsets});
  if constexpr (kWithCuda) {
    void* stream = call.y.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::combine_grad_projection(grad_out, call.y, order, offsets, call.route_weight,
                                  call.projection, stream);
  }
}

}  // namespace

void bind_combine(py::module_& m) {
  m.def("combine_forward", &forward, py::arg("y"), py::arg("projection"), py::arg("packed"),
        py::arg("bias"), py::arg("index"), py::arg("route_weight"), py::arg("out"),
        py::arg("threads"), "Writes out. See pyeff.ops.combine.");
  m.def("combine_grad_input", &grad_input, py::arg("grad_out"), py::arg("y"), py::arg("projection"),
        py::arg("index"), py::arg("route_weight"), py::arg("grad_y"), py::arg("grad_route_weight"),
        py::arg("threads"), "Writes the gradients of y and of the route weights.");
  m.def("combine_grad_projection", &grad_projection, py::arg("grad_out"), py::arg("y"),
        py::arg("index"), py::arg("route_weight"), py::arg("grad_projection"), py::arg("threads"),
        "Writes the gradient of projection, zero for branches that no image chose.");
  m.def("combine_forward_cuda", &forward_cuda, py::arg("y"), py::arg("projection"), py::arg("bias"),
        py::arg("index"), py::arg("route_weight"), py::arg("out"), "Writes out.");
  m.def("combine_grad_input_cuda", &grad_input_cuda, py::arg("grad_out"), py::arg("y"),
        py::arg("projection"), py::arg("index"), py::arg("route_weight"), py::arg("grad_y"),
        py::arg("grad_route_weight"), "Writes the gradients of y and of the route weights.");
  m.def("combine_grad_projection_cuda", &grad_projection_cuda, py::arg("grad_out"), py::arg("y"),
        py::arg("index"), py::arg("order"), py::arg("offsets"), py::arg("route_weight"),
        py::arg("grad_projection"),
        "Writes the gradient of projection, zero for branches that no image chose.");
}

}  // namespace pyeff::bindings
