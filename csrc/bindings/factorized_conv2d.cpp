#include "pyeff/factorized_conv2d.h"

#include "bindings/branch_arg.h"

namespace pyeff::bindings {
namespace {

Activation read_activation(const char* op, std::int64_t number) {
  if (number < 0 || number > static_cast<int>(Activation::kHardswish)) {
    fail(op, "inner and outer must be activations from 0 to 4");
  }
  return static_cast<Activation>(number);
}

// (stride, padding, dilation, inner, outer, winograd, threads)
struct Problem {
  Problem(const char* op, const py::tuple& integers) {
    const auto v = read_integers<7>(op, integers);
    outer = read_activation(op, v[4]);
    conv = {require_integer(op, "stride", v[0], 1),
            require_integer(op, "padding", v[1], 0),
            require_integer(op, "dilation", v[2], 1),
            read_activation(op, v[3]),
            v[5] != 0,
            read_threads(op, v[6])};
  }

  FactorizedConv2d conv;
  Activation outer;
};

// [O, I, n, 1] or [O, I, 1, n]
void check_weight(const char* op, const TensorView& weight) {
  if (weight.ndim != 4 || (weight.shape[2] != 1 && weight.shape[3] != 1)) {
    fail(op, std::string(weight.name) + " must be [O, I, n, 1] or [O, I, 1, n]");
  }
  for (int d = 0; d < weight.ndim; ++d) {
    if (weight.shape[d] < 1) fail(op, std::string(weight.name) + " must have channels and taps");
  }
  if (!is_floating_point(weight.dtype)) {
    fail(op, std::string(weight.name) + " must be a floating-point tensor");
  }
  require_on_cpu(op, weight);
}

void check_winograd(const char* op, const TensorView& weight, std::int64_t stride) {
  if (!cpu::line_can_winograd(weight) || stride != 1) {
    fail(op, "winograd needs float32 or bfloat16, three taps and stride 1");
  }
}

// [N, C, H, W] with the channels side by side.
void require_map(const char* op, const TensorView& t, const TensorView& like) {
  if (t.ndim != 4) fail(op, std::string(t.name) + " must have 4 dimensions");
  if (t.shape[1] > 1 && t.stride[1] != 1) fail(op, std::string(t.name) + " must be channels_last");
  require_like(op, t, like);
}

// [count], of the map's type or float32.
void require_vector(const char* op, const std::optional<TensorArg>& t, std::int64_t count) {
  if (!t) return;
  require_shape(op, *t, {count});
  require_contiguous(op, *t);
  require_on_cpu(op, *t);
  if (!is_floating_point((*t)->dtype)) {
    fail(op, std::string((*t)->name) + " must be a floating-point tensor");
  }
}

// The tensors of one line.
struct LineArgs {
  LineArgs(const char* op, py::handle weight_, py::handle packed_, py::handle bias_,
           const char* suffix)
      : names{std::string("w_") + suffix, std::string("packed_") + suffix,
              std::string("b_") + suffix},
        weight(weight_, names[0].c_str()),
        packed(optional_tensor(packed_, names[1].c_str())),
        bias(optional_tensor(bias_, names[2].c_str())) {
    check_weight(op, weight);
    require_vector(op, bias, weight->shape[0]);
  }

  Line line(bool vertical) const {
    return {*weight, view_or_null(packed), view_or_null(bias), vertical, false};
  }
  bool vertical() const { return weight->shape[3] == 1; }
  bool horizontal() const { return weight->shape[2] == 1; }
  std::int64_t taps() const { return weight->shape[2] * weight->shape[3]; }

  void check(const char* op, const Problem& problem) const {
    const bool winograd = problem.conv.winograd;
    if (winograd) check_winograd(op, weight, problem.conv.stride);
    if (packed) {
      require_packed(op, **packed, weight,
                     cpu::factorized_conv2d_packed_elements(weight, winograd));
    }
  }

  std::array<std::string, 3> names;
  TensorArg weight;
  std::optional<TensorArg> packed, bias;
};

// The tensors of an epilogue for y [N, F, H', W'].
struct EpilogueArgs {
  EpilogueArgs(const char* op, py::handle scale_, py::handle shift_, py::handle residual_,
               const TensorView& y)
      : scale(optional_tensor(scale_, "scale")),
        shift(optional_tensor(shift_, "shift")),
        residual(optional_tensor(residual_, "residual")) {
    require_vector(op, scale, y.shape[1]);
    require_vector(op, shift, y.shape[1]);
    if (residual) {
      require_map(op, *residual, y);
      require_shape(op, *residual, {y.shape[0], y.shape[1], y.shape[2], y.shape[3]});
    }
  }

  Epilogue epilogue(Activation activation) const {
    return {view_or_null(scale), view_or_null(shift), view_or_null(residual), activation};
  }

  std::optional<TensorArg> scale, shift, residual;
};

// x [N, channels, H, W] and y [N, features, H', W'].
void check_maps(const char* op, const TensorView& x, const TensorView& y, const TensorView& weight,
                std::int64_t features) {
  require_map(op, x, weight);
  require_map(op, y, weight);
  if (x.shape[1] != weight.shape[1]) fail(op, "x must have the input channels of the weight");
  if (y.shape[0] != x.shape[0] || y.shape[1] != features) {
    fail(op, "y must have the batch size of x and the output channels of the weight");
  }
}

// A line changes the size along itself only.
void check_across(const char* op, const Line& line, const TensorView& x, const TensorView& y) {
  const int across = line.vertical ? 3 : 2;
  if (x.shape[across] != y.shape[across]) {
    fail(op, std::string(y.name) + " must have the size of " + x.name + " across the line");
  }
}

std::int64_t packed_elements(py::handle weight_, bool winograd) {
  constexpr const char* op = "factorized_conv2d_packed_elements";
  const TensorArg weight(weight_, "weight");
  check_weight(op, weight);
  if (winograd) check_winograd(op, weight, 1);
  return cpu::factorized_conv2d_packed_elements(weight, winograd);
}

void pack(py::handle weight_, py::handle packed_, bool winograd) {
  constexpr const char* op = "factorized_conv2d_pack";
  const TensorArg weight(weight_, "weight"), packed(packed_, "packed");
  check_weight(op, weight);
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
  first.check(op, problem);
  second.check(op, problem);
  check_maps(op, x, y, first.weight, second.weight->shape[0]);
  require_like(op, second.weight, first.weight);
  if (second.weight->shape[1] != first.weight->shape[0]) {
    fail(op, "w_second must have as many input channels as w_first has output channels");
  }
  const bool vertical_first = first.vertical() && second.horizontal();
  if (first.taps() != second.taps() ||
      !(vertical_first || (first.horizontal() && second.vertical()))) {
    fail(op, "w_first and w_second must be n x 1 and 1 x n, in either order");
  }
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
  args.check(op, problem);
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
  args.check(op, problem);
  check_maps(op, grad_x, grad_y, args.weight, args.weight->shape[0]);
  const Line line = args.line(args.vertical());
  check_across(op, line, grad_x, grad_y);
  const FactorizedConv2d& conv = problem.conv;
  if (conv.stride != 1 || conv.padding > conv.dilation * (args.taps() - 1)) {
    fail(op, "stride must be 1 and padding at most dilation * (n - 1)");
  }
  if (before) {
    require_map(op, *before, grad_x);
    const auto& shape = grad_x->shape;
    require_shape(op, *before, {shape[0], shape[1], shape[2], shape[3]});
  }
  const py::gil_scoped_release no_gil;
  cpu::factorized_conv2d_grad_input(grad_y, line, view_or_null(before), grad_x, conv);
}

void line_grad_weight(py::handle grad_y_, py::handle x_, py::handle grad_weight,
                      py::handle grad_bias, const py::tuple& integers) {
  constexpr const char* op = "factorized_conv2d_line_grad_weight";
  const Problem problem(op, integers);
  const LineArgs args(op, grad_weight, py::none(), grad_bias, "first");
  const TensorArg grad_y(grad_y_, "grad_y"), x(x_, "x");
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
}

}  // namespace pyeff::bindings
