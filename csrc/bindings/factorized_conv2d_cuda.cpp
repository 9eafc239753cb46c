#include "bindings/factorized_arg.h"
#include "bindings/gpu_arg.h"

namespace pyeff::bindings {
namespace {

// The kernels number pixels, and what a weight has, by int.
constexpr std::int64_t kMostElements = std::int64_t{1} << 30;

void require_numbered(const char* op, std::initializer_list<const TensorView*> maps,
                      std::initializer_list<const TensorView*> weights) {
  for (const TensorView* t : maps) {
    if (t->shape[0] * t->shape[2] * t->shape[3] < kMostElements) continue;
    fail_not_implemented(op, std::string(t->name) + " must have fewer than 2^30 pixels");
  }
  for (const TensorView* t : weights) {
    if (t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3] < kMostElements) continue;
    fail_not_implemented(op, std::string(t->name) + " must have fewer than 2^30 elements");
  }
}

// The kernels read vectors as they are.
void require_types(const char* op, const TensorView& x,
                   std::initializer_list<const std::optional<TensorArg>*> vectors) {
  for (const auto* t : vectors) {
    if (!*t || (**t)->dtype == x.dtype || (**t)->dtype == Dtype::kFloat32) continue;
    fail(op, std::string((**t)->name) + " must have the dtype of x or be float32");
  }
}

bool fits(py::handle w_first, py::handle w_second, py::handle y_, const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d_fits";
  const Problem problem(op, integers);
  const LineArgs first(op, w_first, py::none(), py::none(), "first");
  const LineArgs second(op, w_second, py::none(), py::none(), "second");
  const TensorArg y(y_, "y");
  const bool vertical_first = check_pair(op, first, second);
  require_map(op, y, first.weight);
  require_on_gpu(op, {&*first.weight});
  if constexpr (kWithCuda) {
    return cuda::factorized_conv2d_fits(first.line(vertical_first), second.line(!vertical_first), y,
                                        problem.conv);
  }
  return false;
}

void forward(py::handle x_, py::handle w_first, py::handle b_first, py::handle w_second,
             py::handle b_second, py::handle scale, py::handle shift, py::handle residual,
             py::handle y_, const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d";
  const Problem problem(op, integers);
  const LineArgs first(op, w_first, py::none(), b_first, "first");
  const LineArgs second(op, w_second, py::none(), b_second, "second");
  const TensorArg x(x_, "x"), y(y_, "y");
  check_maps(op, x, y, first.weight, second.weight->shape[0]);
  const bool vertical_first = check_pair(op, first, second);
  const EpilogueArgs epilogue(op, scale, shift, residual, y);
  require_types(op, x, {&first.bias, &second.bias, &epilogue.scale, &epilogue.shift});
  require_on_gpu(op, {&*first.weight});
  require_numbered(op, {&*x, &*y}, {&*first.weight, &*second.weight});
  if constexpr (kWithCuda) {
    const Line one = first.line(vertical_first), two = second.line(!vertical_first);
    if (!cuda::factorized_conv2d_fits(one, two, y, problem.conv)) {
      fail_not_implemented(op, "one kernel cannot run this pair; use two lines");
    }
    void* stream = x.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::factorized_conv2d_forward(x, one, two, epilogue.epilogue(problem.outer), y, problem.conv,
                                    stream);
  }
}

void line_forward(py::handle x_, py::handle weight, py::handle bias, py::handle scale,
                  py::handle shift, py::handle residual, py::handle y_, bool vertical,
                  const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d_line";
  const Problem problem(op, integers);
  const LineArgs args(op, weight, py::none(), bias, "first");
  const TensorArg x(x_, "x"), y(y_, "y");
  check_maps(op, x, y, args.weight, args.weight->shape[0]);
  const EpilogueArgs epilogue(op, scale, shift, residual, y);
  const Line line = args.line(vertical);
  check_way(op, args, vertical);
  check_across(op, line, x, y);
  require_types(op, x, {&args.bias, &epilogue.scale, &epilogue.shift});
  require_on_gpu(op, {&*args.weight});
  require_numbered(op, {&*x, &*y}, {&*args.weight});
  if constexpr (kWithCuda) {
    void* stream = x.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::factorized_conv2d_line_forward(x, line, epilogue.epilogue(problem.outer), y, problem.conv,
                                         stream);
  }
}

void line_grad_input(py::handle grad_y_, py::handle weight, py::handle before_, py::handle grad_x_,
                     bool vertical, const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d_line_grad_input";
  const Problem problem(op, integers);
  const LineArgs args(op, weight, py::none(), py::none(), "first");
  const TensorArg grad_y(grad_y_, "grad_y"), grad_x(grad_x_, "grad_x");
  const auto before = optional_tensor(before_, "before");
  check_maps(op, grad_x, grad_y, args.weight, args.weight->shape[0]);
  const Line line = args.line(vertical);
  check_way(op, args, vertical);
  check_across(op, line, grad_x, grad_y);
  check_before(op, before, grad_x);
  require_on_gpu(op, {&*args.weight});
  require_numbered(op, {&*grad_x, &*grad_y}, {&*args.weight});
  if constexpr (kWithCuda) {
    void* stream = grad_y.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::factorized_conv2d_line_grad_input(grad_y, line, view_or_null(before), grad_x,
                                            problem.conv, stream);
  }
}

std::int64_t partial_elements(py::handle grad_y_, py::handle weight_, const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d_partial_elements";
  const Problem problem(op, integers);
  const TensorArg grad_y(grad_y_, "grad_y"), weight(weight_, "weight");
  check_weight(op, weight);
  require_map(op, grad_y, weight);
  require_on_gpu(op, {&*weight});
  require_numbered(op, {&*grad_y}, {&*weight});
  if constexpr (kWithCuda) {
    return cuda::factorized_conv2d_partial_elements(grad_y, weight, problem.conv);
  }
  return 0;
}

void line_grad_weight(py::handle grad_y_, py::handle x_, py::handle grad_weight,
                      py::handle partial_, bool vertical, const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d_line_grad_weight";
  const Problem problem(op, integers);
  const LineArgs args(op, grad_weight, py::none(), py::none(), "first");
  const TensorArg grad_y(grad_y_, "grad_y"), x(x_, "x"), partial(partial_, "partial");
  check_maps(op, x, grad_y, args.weight, args.weight->shape[0]);
  const Line line = args.line(vertical);
  check_way(op, args, vertical);
  check_across(op, line, x, grad_y);
  require_on_gpu(op, {&*args.weight, &*partial});
  require_numbered(op, {&*x, &*grad_y}, {&*args.weight});
  if constexpr (kWithCuda) {
    const Dtype sums = x->dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    require_shape(op, partial,
                  {cuda::factorized_conv2d_partial_elements(grad_y, args.weight, problem.conv)});
    require_contiguous(op, partial);
    if (partial->dtype != sums) fail(op, "partial must be float32, or float64 for float64 maps");
    void* stream = x.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::factorized_conv2d_line_grad_weight(grad_y, x, line, partial, problem.conv, stream);
  }
}

}  // namespace

void bind_factorized_conv2d_cuda(py::module_& m) {
  m.def("factorized_conv2d_fits_cuda", &fits, py::arg("w_first"), py::arg("w_second"), py::arg("y"),
        py::arg("problem"), "Whether one kernel can run the pair.");
  m.def("factorized_conv2d_forward_cuda", &forward, py::arg("x"), py::arg("w_first"),
        py::arg("b_first"), py::arg("w_second"), py::arg("b_second"), py::arg("scale"),
        py::arg("shift"), py::arg("residual"), py::arg("y"), py::arg("problem"),
        "Writes y, both convolutions in one kernel. See pyeff.ops.factorized_conv2d.");
  m.def("factorized_conv2d_line_forward_cuda", &line_forward, py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("scale"), py::arg("shift"), py::arg("residual"), py::arg("y"),
        py::arg("vertical"), py::arg("problem"),
        "Writes y: one 1-D convolution with its epilogue.");
  m.def("factorized_conv2d_line_grad_input_cuda", &line_grad_input, py::arg("grad_y"),
        py::arg("weight"), py::arg("before"), py::arg("grad_x"), py::arg("vertical"),
        py::arg("problem"), "Writes the gradient of a line's input.");
  m.def("factorized_conv2d_partial_elements_cuda", &partial_elements, py::arg("grad_y"),
        py::arg("weight"), py::arg("problem"), "Elements of a weight gradient's workspace.");
  m.def("factorized_conv2d_line_grad_weight_cuda", &line_grad_weight, py::arg("grad_y"),
        py::arg("x"), py::arg("grad_weight"), py::arg("partial"), py::arg("vertical"),
        py::arg("problem"), "Writes the gradient of a line's weight.");
}

}  // namespace pyeff::bindings
