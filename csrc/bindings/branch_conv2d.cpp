#include "pyeff/branch_conv2d.h"

#include <cmath>

#include "bindings/branch_arg.h"

namespace pyeff::bindings {
namespace {

// (stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups, threads)
BranchConv2d read_problem(const char* op, const py::tuple& integers) {
  const auto v = read_integers<8>(op, integers);
  return {read_window(op, v.data()), read_groups(op, v[6]), read_threads(op, v[7])};
}

void check_weight(const char* op, const TensorView& weight, std::int64_t groups) {
  if (weight.ndim != 5) fail(op, "weight must have 5 dimensions [B, O, C / groups, kh, kw]");
  for (int d = 0; d < weight.ndim; ++d) {
    if (weight.shape[d] < 1) fail(op, "weight must have branches, channels and a kernel");
  }
  if (weight.shape[1] % groups != 0) fail(op, "groups must divide the weight's output channels");
  if (!is_floating_point(weight.dtype)) fail(op, "weight must be a floating-point tensor");
  require_contiguous(op, weight);
  require_on_cpu(op, weight);
}

// [N, channels, H, W] or [N, k, channels, H, W], the channels side by side.
void require_maps(const char* op, const TensorView& t, bool may_be_shared, std::int64_t channels,
                  const TensorView& index, const TensorView& weight) {
  const bool shared = may_be_shared && t.ndim == 4;
  const int at = shared ? 1 : 2;
  if ((!shared && t.ndim != 5) || t.shape[0] != index.shape[0] || t.shape[at] != channels ||
      (!shared && t.shape[1] != index.shape[1])) {
    fail(op, std::string(t.name) + " must be " + (may_be_shared ? "[N, C, H, W] or " : "") +
                 "[N, k, C, H, W] with N " + std::to_string(index.shape[0]) + ", k " +
                 std::to_string(index.shape[1]) + " and C " + std::to_string(channels));
  }
  if (channels > 1 && t.stride[at] != 1 && t.shape[0] > 0) {
    fail(op, std::string(t.name) + " must have its channels side by side");
  }
  require_like(op, t, weight);
}

// The kernels copy maps together with the zeros that a window reads around them. The size of that
// copy, for `dest` positions `stride` apart, must not overflow.
void require_band(const char* op, const TensorView& dest, std::int64_t stride_h,
                  std::int64_t stride_w, const TensorView& weight, const BranchConv2d& conv) {
  const ConvWindow& w = conv.window;
  const auto side = [](std::int64_t size, std::int64_t stride, std::int64_t kernel,
                       std::int64_t dilation) {
    return std::fabs(double(size - 1) * double(stride)) + double(kernel) * double(dilation) + 1;
  };
  const double rows = side(dest.shape[dest.ndim - 2], stride_h, weight.shape[3], w.dilation_h);
  const double cols = side(dest.shape[dest.ndim - 1], stride_w, weight.shape[4], w.dilation_w);
  const double channels = double(weight.shape[1] + weight.shape[2] * conv.groups) + 64;
  constexpr double kMostElements = 1e15;
  if (rows * cols * channels > kMostElements) {
    fail(op, "stride, padding and dilation must give maps that fit into memory");
  }
}

// What the three directions have in common; `weight` is the gradient of the weight in the last.
struct Call {
  Call(const char* op, py::handle weight_, const char* weight_name, py::handle index_,
       const py::tuple& integers)
      : weight(weight_, weight_name),
        index(index_, "routes.index"),
        conv(read_problem(op, integers)) {
    check_weight(op, weight, conv.groups);
    require_index(op, index);
    require_branches(op, index, weight->shape[0]);
  }

  std::int64_t inputs() const { return weight->shape[2] * conv.groups; }
  std::int64_t outputs() const { return weight->shape[1]; }

  TensorArg weight, index;
  BranchConv2d conv;
};

// A bias or its gradient, [B, O].
void require_bias(const char* op, const std::optional<TensorArg>& bias, const TensorView& weight) {
  if (!bias) return;
  require_shape(op, **bias, {weight.shape[0], weight.shape[1]});
  require_contiguous(op, **bias);
  require_like(op, **bias, weight);
}

std::int64_t packed_elements(py::handle weight_, std::int64_t groups) {
  constexpr const char* op = "branch_conv2d_packed_elements";
  const TensorArg weight(weight_, "weight");
  check_weight(op, weight, read_groups(op, groups));
  return cpu::branch_conv2d_packed_elements(weight, groups);
}

void pack(py::handle weight_, py::handle packed_, std::int64_t groups, std::int64_t threads_) {
  constexpr const char* op = "branch_conv2d_pack";
  const TensorArg weight(weight_, "weight"), packed(packed_, "packed");
  check_weight(op, weight, read_groups(op, groups));
  const int threads = read_threads(op, threads_);
  require_packed(op, packed, weight, cpu::branch_conv2d_packed_elements(weight, groups));
  const py::gil_scoped_release no_gil;
  cpu::branch_conv2d_pack(weight, packed, groups, threads);
}

void forward(py::handle x_, py::handle weight_, py::handle packed_, py::handle bias_,
             py::handle index_, py::handle y_, const py::tuple& integers) {
  constexpr const char* op = "branch_conv2d";
  const Call call(op, weight_, "weight", index_, integers);
  const TensorArg x(x_, "x"), y(y_, "y");
  const auto packed = optional_tensor(packed_, "packed");
  const auto bias = optional_tensor(bias_, "bias");
  require_maps(op, x, true, call.inputs(), call.index, call.weight);
  require_maps(op, y, false, call.outputs(), call.index, call.weight);
  require_band(op, y, call.conv.window.stride_h, call.conv.window.stride_w, call.weight, call.conv);
  require_bias(op, bias, call.weight);
  if (packed) {
    require_packed(op, **packed, call.weight,
                   cpu::branch_conv2d_packed_elements(call.weight, call.conv.groups));
  }
  const py::gil_scoped_release no_gil;
  cpu::branch_conv2d_forward(x, call.weight, view_or_null(packed), view_or_null(bias), call.index,
                             y, call.conv);
}

void grad_input(py::handle grad_y_, py::handle weight_, py::handle index_, py::handle grad_x_,
                const py::tuple& integers) {
  constexpr const char* op = "branch_conv2d_grad_input";
  const Call call(op, weight_, "weight", index_, integers);
  const TensorArg grad_y(grad_y_, "grad_y"), grad_x(grad_x_, "grad_x");
  require_maps(op, grad_y, false, call.outputs(), call.index, call.weight);
  require_maps(op, grad_x, true, call.inputs(), call.index, call.weight);
  require_band(op, grad_x, 1, 1, call.weight, call.conv);
  const py::gil_scoped_release no_gil;
  cpu::branch_conv2d_grad_input(grad_y, call.weight, call.index, grad_x, call.conv);
}

void grad_weight(py::handle grad_y_, py::handle x_, py::handle index_, py::handle grad_weight_,
                 py::handle grad_bias_, const py::tuple& integers) {
  constexpr const char* op = "branch_conv2d_grad_weight";
  const Call call(op, grad_weight_, "grad_weight", index_, integers);
  const TensorArg grad_y(grad_y_, "grad_y"), x(x_, "x");
  const auto grad_bias = optional_tensor(grad_bias_, "grad_bias");
  require_maps(op, grad_y, false, call.outputs(), call.index, call.weight);
  require_maps(op, x, true, call.inputs(), call.index, call.weight);
  require_band(op, grad_y, call.conv.window.stride_h, call.conv.window.stride_w, call.weight,
               call.conv);
  require_bias(op, grad_bias, call.weight);
  const py::gil_scoped_release no_gil;
  cpu::branch_conv2d_grad_weight(grad_y, x, call.index, call.weight, view_or_null(grad_bias),
                                 call.conv);
}

}  // namespace

void bind_branch_conv2d(py::module_& m) {
  m.def("branch_conv2d_packed_elements", &packed_elements, py::arg("weight"), py::arg("groups"),
        "How many elements the packed form of weight has.");
  m.def("branch_conv2d_pack", &pack, py::arg("weight"), py::arg("packed"), py::arg("groups"),
        py::arg("threads"), "Writes the packed form of weight.");
  m.def("branch_conv2d_forward", &forward, py::arg("x"), py::arg("weight"), py::arg("packed"),
        py::arg("bias"), py::arg("index"), py::arg("y"), py::arg("problem"),
        "Writes y. See pyeff.ops.branch_conv2d.");
  m.def("branch_conv2d_grad_input", &grad_input, py::arg("grad_y"), py::arg("weight"),
        py::arg("index"), py::arg("grad_x"), py::arg("problem"), "Writes the gradient of x.");
  m.def("branch_conv2d_grad_weight", &grad_weight, py::arg("grad_y"), py::arg("x"),
        py::arg("index"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("problem"),
        "Writes the gradients of weight and bias, zero for branches that no image chose.");
}

}  // namespace pyeff::bindings
