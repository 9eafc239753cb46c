#include "pyeff/branch_conv2d.h"

#include <cmath>

#include "bindings/branch_arg.h"
#include "bindings/gpu_arg.h"

namespace pyeff::bindings {
namespace {

// (stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups, threads, tf32)
BranchConv2d read_problem(const char* op, const py::tuple& integers) {
  const auto v = read_integers<9>(op, integers);
  return {read_window(op, v.data()), read_groups(op, v[6]), read_threads(op, v[7]), v[8] != 0};
}

void check_weight(const char* op, const TensorView& weight, std::int64_t groups) {
  if (weight.ndim != 5) fail(op, "weight must have 5 dimensions [B, O, C / groups, kh, kw]");
  for (int d = 0; d < weight.ndim; ++d) {
    if (weight.shape[d] < 1) fail(op, "weight must have branches, channels and a kernel");
  }
  if (weight.shape[1] % groups != 0) fail(op, "groups must divide the weight's output channels");
  if (!is_floating_point(weight.dtype)) fail(op, "weight must be a floating-point tensor");
}

void check_cpu_weight(const char* op, const TensorView& weight, std::int64_t groups) {
  check_weight(op, weight, groups);
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
    require_routes(op, index);
  }

  std::int64_t inputs() const { return weight->shape[2] * conv.groups; }
  std::int64_t outputs() const { return weight->shape[1]; }

  TensorArg weight, index;
  BranchConv2d conv;
};

struct CpuCall : Call {
  CpuCall(const char* op, py::handle weight_, const char* weight_name, py::handle index_,
          const py::tuple& integers)
      : Call(op, weight_, weight_name, index_, integers) {
    check_cpu_weight(op, weight, conv.groups);
    require_index(op, index);
    require_branches(op, index, weight->shape[0]);
  }
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
  check_cpu_weight(op, weight, read_groups(op, groups));
  return cpu::branch_conv2d_packed_elements(weight, groups);
}

void pack(py::handle weight_, py::handle packed_, std::int64_t groups, std::int64_t threads_) {
  constexpr const char* op = "branch_conv2d_pack";
  const TensorArg weight(weight_, "weight"), packed(packed_, "packed");
  check_cpu_weight(op, weight, read_groups(op, groups));
  const int threads = read_threads(op, threads_);
  require_packed(op, packed, weight, cpu::branch_conv2d_packed_elements(weight, groups));
  const py::gil_scoped_release no_gil;
  cpu::branch_conv2d_pack(weight, packed, groups, threads);
}

void forward(py::handle x_, py::handle weight_, py::handle packed_, py::handle bias_,
             py::handle index_, py::handle y_, const py::tuple& integers) {
  constexpr const char* op = "branch_conv2d";
  const CpuCall call(op, weight_, "weight", index_, integers);
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
  const CpuCall call(op, weight_, "weight", index_, integers);
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
  const CpuCall call(op, grad_weight_, "grad_weight", index_, integers);
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

// --- CUDA ----------------------------------------------------------------------------------------

// [B, O, kh, kw, C / groups] in memory.
void require_innermost(const char* op, const TensorView& weight) {
  TensorView turned = weight;
  turned.shape = {weight.shape[0], weight.shape[1], weight.shape[3], weight.shape[4],
                  weight.shape[2]};
  turned.stride = {weight.stride[0], weight.stride[1], weight.stride[3], weight.stride[4],
                   weight.stride[2]};
  require_contiguous(op, turned);
}

// The kernels number the pixels of a map, and the blocks of a launch, by 31 bits.
void require_blocks(const char* op, const TensorView& maps) {
  require_countable(op, "pixels of a map, and 64,",
                    maps.shape[maps.ndim - 2] * maps.shape[maps.ndim - 1] + 64);
  std::int64_t elements = maps.ndim == 5 ? maps.shape[0] * maps.shape[1] : maps.shape[0];
  for (int d = maps.ndim - 3; d < maps.ndim; ++d) elements *= maps.shape[d];
  require_countable(op, "elements of the result / 128", elements / 128);
}

void forward_cuda(py::handle x_, py::handle weight_, py::handle bias_, py::handle index_,
                  py::handle y_, const py::tuple& integers) {
  constexpr const char* op = "branch_conv2d";
  const Call call(op, weight_, "weight", index_, integers);
  const TensorArg x(x_, "x"), y(y_, "y");
  const auto bias = optional_tensor(bias_, "bias");
  require_innermost(op, call.weight);
  require_maps(op, x, true, call.inputs(), call.index, call.weight);
  require_maps(op, y, false, call.outputs(), call.index, call.weight);
  require_blocks(op, y);
  require_bias(op, bias, call.weight);
  require_on_gpu(op, {&*call.weight, &*call.index});
  if constexpr (kWithCuda) {
    void* stream = x.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::branch_conv2d_forward(x, call.weight, view_or_null(bias), call.index, y, call.conv,
                                stream);
  }
}

// weight [B, C, O / groups, kh, kw]: every group transposed.
void grad_input_cuda(py::handle grad_y_, py::handle weight_, py::handle index_, py::handle grad_x_,
                     const py::tuple& integers) {
  constexpr const char* op = "branch_conv2d_grad_input";
  const Call call(op, weight_, "weight", index_, integers);
  const TensorArg grad_y(grad_y_, "grad_y"), grad_x(grad_x_, "grad_x");
  require_innermost(op, call.weight);
  require_maps(op, grad_y, false, call.inputs(), call.index, call.weight);
  require_maps(op, grad_x, true, call.outputs(), call.index, call.weight);
  require_blocks(op, grad_x);
  require_on_gpu(op, {&*call.weight, &*call.index});
  if constexpr (kWithCuda) {
    void* stream = grad_y.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::branch_conv2d_grad_input(grad_y, call.weight, call.index, grad_x, call.conv, stream);
  }
}

void grad_weight_cuda(py::handle grad_y_, py::handle x_, py::handle index_, py::handle order_,
                      py::handle offsets_, py::handle grad_weight_, py::handle grad_bias_,
                      const py::tuple& integers) {
  constexpr const char* op = "branch_conv2d_grad_weight";
  const Call call(op, grad_weight_, "grad_weight", index_, integers);
  const TensorArg grad_y(grad_y_, "grad_y"), x(x_, "x"), order(order_, "order");
  const TensorArg offsets(offsets_, "offsets");
  const auto grad_bias = optional_tensor(grad_bias_, "grad_bias");
  require_contiguous(op, call.weight);
  require_maps(op, grad_y, false, call.outputs(), call.index, call.weight);
  require_maps(op, x, true, call.inputs(), call.index, call.weight);
  require_blocks(op, grad_y);
  require_bias(op, grad_bias, call.weight);
  require_plan(op, order, offsets, call.index->shape[0] * call.index->shape[1],
               call.weight->shape[0]);
  require_on_gpu(op, {&*call.weight, &*call.index, &*order, &*offsets});
  if constexpr (kWithCuda) {
    void* stream = x.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::branch_conv2d_grad_weight(grad_y, x, order, offsets, call.weight, view_or_null(grad_bias),
                                    call.conv, stream);
  }
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
  m.def("branch_conv2d_forward_cuda", &forward_cuda, py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("index"), py::arg("y"), py::arg("problem"), "Writes y.");
  m.def("branch_conv2d_grad_input_cuda", &grad_input_cuda, py::arg("grad_y"), py::arg("weight"),
        py::arg("index"), py::arg("grad_x"), py::arg("problem"), "Writes the gradient of x.");
  m.def("branch_conv2d_grad_weight_cuda", &grad_weight_cuda, py::arg("grad_y"), py::arg("x"),
        py::arg("index"), py::arg("order"), py::arg("offsets"), py::arg("grad_weight"),
        py::arg("grad_bias"), py::arg("problem"),
        "Writes the gradients of weight and bias, zero for branches that no image chose.");
}

}  // namespace pyeff::bindings
