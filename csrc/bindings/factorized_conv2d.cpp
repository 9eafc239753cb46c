#include "pyeff/factorized_conv2d.h"

#include "bindings/factorized_arg.h"

namespace pyeff::bindings {
namespace {

void check_winograd(const char* op, const TensorView& weight, std::int64_t stride) {
  if (!cpu::line_can_winograd(weight) || stride != 1) {
    fail(op, "winograd needs float32 or bfloat16, three taps and stride 1");
  }
}

// What the CPU kernels want of a line beside.
void check_line(const char* op, const LineArgs& line, const Problem& problem) {
  require_on_cpu(op, line.weight);
  const bool winograd = problem.conv.winograd;
  if (winograd) check_winograd(op, line.weight, problem.conv.stride);
  if (line.packed) {
    require_packed(op, **line.packed, line.weight,
                   cpu::factorized_conv2d_packed_elements(line.weight, winograd));
  }
}

std::int64_t packed_elements(py::handle weight_, bool winograd) {
  constexpr const char* op = "factorized_conv2d_packed_elements";
  const TensorArg weight(weight_, "weight");
  check_weight(op, weight);
  require_on_cpu(op, weight);
  if (winograd) check_winograd(op, weight, 1);
  return cpu::factorized_conv2d_packed_elements(weight, winograd);
}

void pack(py::handle weight_, py::handle packed_, bool winograd) {
  constexpr const char* op = "factorized_conv2d_pack";
  const TensorArg weight(weight_, "weight"), packed(packed_, "packed");
  check_weight(op, weight);
  require_on_cpu(op, weight);
  if (winograd) check_winograd(op, weight, 1);
  require_packed(op, packed, weight, cpu::factorized_conv2d_packed_elements(weight, winograd));
  const py::gil_scoped_release no_gil;
  cpu::factorized_conv2d_pack(weight, winograd, packed);
}

void forward(py::handle x_, py::handle w_first, py::handle packed_first, py::handle b_first,
             py::handle w_second, py::handle packed_second, py::handle b_second, py::handle scale,
             py::handle shift, py::handle residual, py::handle y_, const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d";
  const Problem problem(op, integers);
  const LineArgs first(op, w_first, packed_first, b_first, "first");
  const LineArgs second(op, w_second, packed_second, b_second, "second");
  const TensorArg x(x_, "x"), y(y_, "y");
  check_line(op, first, problem);
  check_line(op, second, problem);
  check_maps(op, x, y, first.weight, second.weight->shape[0]);
  const bool vertical_first = check_pair(op, first, second);
  const EpilogueArgs epilogue(op, scale, shift, residual, y);
  const Line one = first.line(vertical_first), two = second.line(!vertical_first);
  const py::gil_scoped_release no_gil;
  cpu::factorized_conv2d_forward(x, one, &two, epilogue.epilogue(problem.outer), y, problem.conv);
}

void line_forward(py::handle x_, py::handle weight, py::handle packed, py::handle bias,
                  py::handle scale, py::handle shift, py::handle residual, py::handle y_,
                  const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d_line";
  const Problem problem(op, integers);
  const LineArgs args(op, weight, packed, bias, "first");
  const TensorArg x(x_, "x"), y(y_, "y");
  check_line(op, args, problem);
  check_maps(op, x, y, args.weight, args.weight->shape[0]);
  const EpilogueArgs epilogue(op, scale, shift, residual, y);
  const Line line = args.line(args.vertical());
  check_across(op, line, x, y);
  const py::gil_scoped_release no_gil;
  cpu::factorized_conv2d_forward(x, line, nullptr, epilogue.epilogue(problem.outer), y,
                                 problem.conv);
}

void line_grad_input(py::handle grad_y_, py::handle weight, py::handle before_, py::handle grad_x_,
                     const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d_line_grad_input";
  const Problem problem(op, integers);
  const LineArgs args(op, weight, py::none(), py::none(), "first");
  const TensorArg grad_y(grad_y_, "grad_y"), grad_x(grad_x_, "grad_x");
  const auto before = optional_tensor(before_, "before");
  check_line(op, args, problem);
  check_maps(op, grad_x, grad_y, args.weight, args.weight->shape[0]);
  const Line line = args.line(args.vertical());
  check_across(op, line, grad_x, grad_y);
  const FactorizedConv2d& conv = problem.conv;
  if (conv.stride != 1 || conv.padding > conv.dilation * (args.taps() - 1)) {
    fail(op, "stride must be 1 and padding at most dilation * (n - 1)");
  }
  check_before(op, before, grad_x);
  const py::gil_scoped_release no_gil;
  cpu::factorized_conv2d_grad_input(grad_y, line, view_or_null(before), grad_x, conv);
}

void line_grad_weight(py::handle grad_y_, py::handle x_, py::handle grad_weight,
                      py::handle grad_bias, const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d_line_grad_weight";
  const Problem problem(op, integers);
  const LineArgs args(op, grad_weight, py::none(), grad_bias, "first");
  const TensorArg grad_y(grad_y_, "grad_y"), x(x_, "x");
  require_on_cpu(op, args.weight);
  check_maps(op, x, grad_y, args.weight, args.weight->shape[0]);
  if (args.bias) require_like(op, *args.bias, args.weight);
  const Line line = args.line(args.vertical());
  check_across(op, line, x, grad_y);
  const py::gil_scoped_release no_gil;
  cpu::factorized_conv2d_grad_weight(grad_y, x, line, line.bias, problem.conv);
}

}  // namespace

void bind_factorized_conv2d(py::module_& m) {
  m.def("factorized_conv2d_packed_elements", &packed_elements, py::arg("weight"),
        py::arg("winograd"), "How many elements the packed form of one line's weight has.");
  m.def("factorized_conv2d_pack", &pack, py::arg("weight"), py::arg("packed"), py::arg("winograd"),
        "Writes the packed form of one line's weight.");
  m.def("factorized_conv2d_forward", &forward, py::arg("x"), py::arg("w_first"),
        py::arg("packed_first"), py::arg("b_first"), py::arg("w_second"), py::arg("packed_second"),
        py::arg("b_second"), py::arg("scale"), py::arg("shift"), py::arg("residual"), py::arg("y"),
        py::arg("problem"), "Writes y. See pyeff.ops.factorized_conv2d.");
  m.def("factorized_conv2d_line_forward", &line_forward, py::arg("x"), py::arg("weight"),
        py::arg("packed"), py::arg("bias"), py::arg("scale"), py::arg("shift"), py::arg("residual"),
        py::arg("y"), py::arg("problem"), "Writes y: one 1-D convolution with its epilogue.");
  m.def("factorized_conv2d_line_grad_input", &line_grad_input, py::arg("grad_y"), py::arg("weight"),
        py::arg("before"), py::arg("grad_x"), py::arg("problem"),
        "Writes the gradient of a line's input.");
  m.def("factorized_conv2d_line_grad_weight", &line_grad_weight, py::arg("grad_y"), py::arg("x"),
        py::arg("grad_weight"), py::arg("grad_bias"), py::arg("problem"),
        "Writes the gradients of a line's weight and bias.");
  bind_factorized_conv2d_cuda(m);
}

}  // namespace pyeff::bindings
