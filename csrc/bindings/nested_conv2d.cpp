#include "pyeff/nested_conv2d.h"

#include "bindings/gpu_arg.h"
#include "bindings/integer_arg.h"

namespace pyeff::bindings {
namespace {

// (in_lo, in_count, out_lo, out_count, stride_h, stride_w, pad_top, pad_left, dilation_h,
//  dilation_w, groups, and what the device is told)
template <std::size_t kCount>
NestedConv2d read_problem(const char* op, const std::array<std::int64_t, kCount>& v) {
  NestedConv2d conv{};
  conv.in = {v[0], v[1], nullptr};
  conv.out = {v[2], v[3], nullptr};
  conv.window = read_window(op, &v[4]);
  conv.groups = read_groups(op, v[10]);
  return conv;
}

void select(const char* op, const std::optional<TensorArg>& index, std::int64_t channels,
            ChannelSelection& selection) {
  if (!index) {
    if (selection.lo < 0 || selection.count < 0 || selection.lo > channels - selection.count) {
      fail(op, "a range must lie within the channels of the weight");
    }
    return;
  }
  const TensorView& t = **index;
  require_shape(op, t, {selection.count});
  require_contiguous(op, t);
  if (t.dtype != Dtype::kInt64) fail(op, std::string(t.name) + " must be int64");
  selection.index = t.as<const std::int64_t>();
}

void check_index(const char* op, const std::optional<TensorArg>& index, std::int64_t channels,
                 const ChannelSelection& selection) {
  if (!index) return;
  const TensorView& t = **index;
  require_on_cpu(op, t);
  for (std::int64_t i = 0; i < selection.count; ++i) {
    if (selection.index[i] < 0 || selection.index[i] >= channels) {
      fail(op, std::string(t.name) + " must name channels of the weight");
    }
  }
}

// [N, C, H, W] with the channels side by side; rows, columns and images may be strided.
void require_image(const char* op, const TensorView& t, std::int64_t channels,
                   const TensorView& weight) {
  if (t.ndim != 4 || t.shape[1] != channels) {
    fail(op, std::string(t.name) + " must have 4 dimensions and " + std::to_string(channels) +
                 " channels");
  }
  if (t.shape[1] > 1 && t.stride[1] != 1) fail(op, std::string(t.name) + " must be channels_last");
  require_like(op, t, weight);
}

void check_weight(const char* op, const TensorView& weight, std::int64_t groups) {
  if (weight.ndim != 4) fail(op, "weight must have 4 dimensions [O, I / groups, kh, kw]");
  if (weight.shape[0] % groups != 0) fail(op, "groups must divide the weight's output channels");
  if (!is_floating_point(weight.dtype)) fail(op, "weight must be a floating-point tensor");
}

void check_groups(const char* op, const NestedConv2d& conv, const TensorView& weight) {
  if (conv.groups == 1) return;
  const std::int64_t in_group = weight.shape[1], out_group = weight.shape[0] / conv.groups;
  if (in_group < 1 || out_group < 1) fail(op, "weight must have channels in every group");
  const bool whole = conv.in.lo % in_group == 0 && conv.in.count % in_group == 0 &&
                     conv.out.lo % out_group == 0 && conv.out.count % out_group == 0;
  if (!whole || conv.in.lo / in_group != conv.out.lo / out_group ||
      conv.in.count / in_group != conv.out.count / out_group || conv.in.index != nullptr ||
      conv.out.index != nullptr) {
    fail(op, "with groups both ranges must cover the same whole groups");
  }
}

void check_bias(const char* op, const std::optional<TensorArg>& bias, const TensorView& weight) {
  if (!bias) return;
  require_shape(op, **bias, {weight.shape[0]});
  require_contiguous(op, **bias);
  require_like(op, **bias, weight);
}

// Everything that the three directions have in common, on any device.
struct AnyCall {
  AnyCall(const char* op, py::handle weight_, py::handle in_index_, py::handle out_index_,
          const NestedConv2d& conv_)
      : weight(weight_, "weight"),
        in_index(optional_tensor(in_index_, "in_index")),
        out_index(optional_tensor(out_index_, "out_index")),
        conv(conv_) {
    check_weight(op, weight, conv.groups);
    select(op, in_index, weight->shape[1] * conv.groups, conv.in);
    select(op, out_index, weight->shape[0], conv.out);
    check_groups(op, conv, weight);
  }

  TensorArg weight;
  std::optional<TensorArg> in_index, out_index;
  NestedConv2d conv;
};

struct Call : AnyCall {
  Call(const char* op, py::handle weight_, py::handle in_index_, py::handle out_index_,
       const py::tuple& integers)
      : Call(op, weight_, in_index_, out_index_, read_integers<12>(op, integers)) {}

 private:
  Call(const char* op, py::handle weight_, py::handle in_index_, py::handle out_index_,
       const std::array<std::int64_t, 12>& v)
      : AnyCall(op, weight_, in_index_, out_index_, read_problem(op, v)) {
    conv.threads = read_threads(op, v[11]);
    require_on_cpu(op, weight);
    check_index(op, in_index, weight->shape[1] * conv.groups, conv.in);
    check_index(op, out_index, weight->shape[0], conv.out);
  }
};

std::int64_t packed_elements(py::handle weight_, std::int64_t groups) {
  constexpr const char* op = "nested_conv2d_packed_elements";
  const TensorArg weight(weight_, "weight");
  check_weight(op, weight, read_groups(op, groups));
  require_on_cpu(op, weight);
  return cpu::nested_conv2d_packed_elements(weight, groups);
}

void pack(py::handle weight_, py::handle packed_, std::int64_t groups, std::int64_t threads_) {
  constexpr const char* op = "nested_conv2d_pack";
  const TensorArg weight(weight_, "weight"), packed(packed_, "packed");
  check_weight(op, weight, read_groups(op, groups));
  require_on_cpu(op, weight);
  const int threads = read_threads(op, threads_);
  require_packed(op, packed, weight, cpu::nested_conv2d_packed_elements(weight, groups));
  const py::gil_scoped_release no_gil;
  cpu::nested_conv2d_pack(weight, packed, groups, threads);
}

void forward(py::handle x_, py::handle weight_, py::handle packed_, py::handle bias_, py::handle y_,
             py::handle in_index, py::handle out_index, const py::tuple& integers) {
  constexpr const char* op = "nested_conv2d";
  const Call call(op, weight_, in_index, out_index, integers);
  const TensorArg x(x_, "x"), y(y_, "y");
  const auto packed = optional_tensor(packed_, "packed");
  const auto bias = optional_tensor(bias_, "bias");
  require_image(op, x, call.conv.in.count, call.weight);
  require_image(op, y, call.conv.out.count, call.weight);
  if (y->shape[0] != x->shape[0]) fail(op, "y must have the batch size of x");
  if (packed) {
    require_packed(op, **packed, call.weight,
                   cpu::nested_conv2d_packed_elements(call.weight, call.conv.groups));
  }
  check_bias(op, bias, call.weight);
  const py::gil_scoped_release no_gil;
  cpu::nested_conv2d_forward(x, call.weight, view_or_null(packed), view_or_null(bias), y,
                             call.conv);
}

void grad_input(py::handle grad_y_, py::handle weight_, py::handle grad_x_, py::handle in_index,
                py::handle out_index, const py::tuple& integers) {
  constexpr const char* op = "nested_conv2d_grad_input";
  const Call call(op, weight_, in_index, out_index, integers);
  const TensorArg grad_y(grad_y_, "grad_y"), grad_x(grad_x_, "grad_x");
  require_image(op, grad_y, call.conv.out.count, call.weight);
  require_image(op, grad_x, call.conv.in.count, call.weight);
  if (grad_y->shape[0] != grad_x->shape[0]) fail(op, "grad_y must have the batch size of grad_x");
  const py::gil_scoped_release no_gil;
  cpu::nested_conv2d_grad_input(grad_y, call.weight, grad_x, call.conv);
}

void grad_weight(py::handle grad_y_, py::handle x_, py::handle grad_weight_, py::handle in_index,
                 py::handle out_index, const py::tuple& integers) {
  constexpr const char* op = "nested_conv2d_grad_weight";
  const Call call(op, grad_weight_, in_index, out_index, integers);
  const TensorArg grad_y(grad_y_, "grad_y"), x(x_, "x");
  require_image(op, grad_y, call.conv.out.count, call.weight);
  require_image(op, x, call.conv.in.count, call.weight);
  if (grad_y->shape[0] != x->shape[0]) fail(op, "grad_y must have the batch size of x");
  const py::gil_scoped_release no_gil;
  cpu::nested_conv2d_grad_weight(grad_y, x, call.weight, call.conv);
}

// --- CUDA ----------------------------------------------------------------------------------------

// The integers end with (tf32, large, shares). Index numbers are not looked at: they lie on the
// GPU, and the kernels leave out those that name no channel.
struct CudaCall : AnyCall {
  CudaCall(const char* op, py::handle weight_, py::handle in_index_, py::handle out_index_,
           const py::tuple& integers)
      : CudaCall(op, weight_, in_index_, out_index_, read_integers<14>(op, integers)) {}

  // x [N, i, H, W] and y [N, o, H', W'], or their gradients.
  void require_maps(const char* op, const TensorView& x, const TensorView& y) const {
    require_image(op, x, conv.in.count, weight);
    require_image(op, y, conv.out.count, weight);
    if (x.shape[0] != y.shape[0]) {
      fail(op, std::string(x.name) + " must have the batch size of " + y.name);
    }
    for (const TensorView* t : {&x, &y}) {
      if (t->shape[0] * t->shape[2] * t->shape[3] > kLargestInteger - 1024) {
        fail(op, std::string(t->name) + " must have fewer than 2^31 - 1024 pixels");
      }
    }
    require_on_gpu(op, {&*weight, &x, &y});
    for (const auto* index : {&in_index, &out_index}) {
      if (*index) require_on_gpu(op, {&*weight, &***index});
    }
  }

  // Shares of `elements` numbers each, where there is more than one.
  void require_workspace(const char* op, const std::optional<TensorArg>& workspace,
                         std::int64_t elements) const {
    if (workspace.has_value() != (plan.shares > 1)) {
      fail(op, "workspace must be there for more than one share, and only then");
    }
    if (!workspace) return;
    const TensorView& t = **workspace;
    require_shape(op, t, {plan.shares, elements});
    require_contiguous(op, t);
    require_on_gpu(op, {&*weight, &t});
    const Dtype dtype = weight->dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    if (t.dtype != dtype) fail(op, "workspace must be float32, or float64 for a float64 weight");
  }

  NestedConv2dPlan plan;

 private:
  CudaCall(const char* op, py::handle weight_, py::handle in_index_, py::handle out_index_,
           const std::array<std::int64_t, 14>& v)
      : AnyCall(op, weight_, in_index_, out_index_, read_problem(op, v)),
        plan{v[11] != 0, v[12] != 0, require_integer(op, "shares", v[13], 1)} {}
};

void forward_cuda(py::handle x_, py::handle weight_, py::handle bias_, py::handle y_,
                  py::handle workspace_, py::handle in_index, py::handle out_index,
                  const py::tuple& integers) {
  constexpr const char* op = "nested_conv2d";
  const CudaCall call(op, weight_, in_index, out_index, integers);
  const TensorArg x(x_, "x"), y(y_, "y");
  const auto bias = optional_tensor(bias_, "bias");
  const auto workspace = optional_tensor(workspace_, "workspace");
  call.require_maps(op, x, y);
  call.require_workspace(op, workspace, y->shape[0] * y->shape[1] * y->shape[2] * y->shape[3]);
  check_bias(op, bias, call.weight);
  if constexpr (kWithCuda) {
    void* const stream = x.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::nested_conv2d_forward(x, call.weight, view_or_null(bias), y, view_or_null(workspace),
                                call.conv, call.plan, stream);
  }
}

void grad_input_cuda(py::handle grad_y_, py::handle weight_, py::handle grad_x_,
                     py::handle workspace_, py::handle in_index, py::handle out_index,
                     const py::tuple& integers) {
  constexpr const char* op = "nested_conv2d_grad_input";
  const CudaCall call(op, weight_, in_index, out_index, integers);
  const TensorArg grad_y(grad_y_, "grad_y"), grad_x(grad_x_, "grad_x");
  const auto workspace = optional_tensor(workspace_, "workspace");
  call.require_maps(op, grad_x, grad_y);
  call.require_workspace(op, workspace,
                         grad_x->shape[0] * grad_x->shape[1] * grad_x->shape[2] * grad_x->shape[3]);
  if constexpr (kWithCuda) {
    void* const stream = grad_y.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::nested_conv2d_grad_input(grad_y, call.weight, grad_x, view_or_null(workspace), call.conv,
                                   call.plan, stream);
  }
}

void grad_weight_cuda(py::handle grad_y_, py::handle x_, py::handle grad_weight_,
                      py::handle workspace_, py::handle in_index, py::handle out_index,
                      const py::tuple& integers) {
  constexpr const char* op = "nested_conv2d_grad_weight";
  const CudaCall call(op, grad_weight_, in_index, out_index, integers);
  const TensorArg grad_y(grad_y_, "grad_y"), x(x_, "x");
  const auto workspace = optional_tensor(workspace_, "workspace");
  const TensorView& weight = call.weight;
  call.require_maps(op, x, grad_y);
  const std::int64_t ins = call.conv.groups == 1 ? call.conv.in.count : weight.shape[1];
  call.require_workspace(op, workspace,
                         call.conv.out.count * weight.shape[2] * weight.shape[3] * ins);
  if constexpr (kWithCuda) {
    void* const stream = x.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::nested_conv2d_grad_weight(grad_y, x, weight, view_or_null(workspace), call.conv,
                                    call.plan, stream);
  }
}

}  // namespace

void bind_nested_conv2d(py::module_& m) {
  m.def("nested_conv2d_packed_elements", &packed_elements, py::arg("weight"), py::arg("groups"),
        "How many elements the packed form of weight has.");
  m.def("nested_conv2d_pack", &pack, py::arg("weight"), py::arg("packed"), py::arg("groups"),
        py::arg("threads"), "Writes the packed form of weight, which serves every selection.");
  m.def("nested_conv2d_forward", &forward, py::arg("x"), py::arg("weight"), py::arg("packed"),
        py::arg("bias"), py::arg("y"), py::arg("in_index"), py::arg("out_index"),
        py::arg("problem"), "Writes y. See pyeff.ops.nested_conv2d.");
  m.def("nested_conv2d_grad_input", &grad_input, py::arg("grad_y"), py::arg("weight"),
        py::arg("grad_x"), py::arg("in_index"), py::arg("out_index"), py::arg("problem"),
        "Writes the gradient of x.");
  m.def("nested_conv2d_grad_weight", &grad_weight, py::arg("grad_y"), py::arg("x"),
        py::arg("grad_weight"), py::arg("in_index"), py::arg("out_index"), py::arg("problem"),
        "Writes the gradient of the full weight, zero outside the selection.");
  m.def("nested_conv2d_forward_cuda", &forward_cuda, py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("y"), py::arg("workspace"), py::arg("in_index"),
        py::arg("out_index"), py::arg("problem"), "Writes y.");
  m.def("nested_conv2d_grad_input_cuda", &grad_input_cuda, py::arg("grad_y"), py::arg("weight"),
        py::arg("grad_x"), py::arg("workspace"), py::arg("in_index"), py::arg("out_index"),
        py::arg("problem"), "Writes the gradient of x.");
  m.def("nested_conv2d_grad_weight_cuda", &grad_weight_cuda, py::arg("grad_y"), py::arg("x"),
        py::arg("grad_weight"), py::arg("workspace"), py::arg("in_index"), py::arg("out_index"),
        py::arg("problem"), "Writes the selected part of the full weight's gradient.");
}

}  // namespace pyeff::bindings
