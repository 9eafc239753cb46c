#include "pyeff/sampler_conv2d.h"

#include "bindings/integer_arg.h"

namespace pyeff::bindings {
namespace {

constexpr const char* kOp = "sampler_conv2d";

// (kernel_h, kernel_w, transposed, activation, threads, stride_h, stride_w, pad_top, pad_left,
//  dilation_h, dilation_w)
SamplerConv2d read_problem(const py::tuple& integers) {
  const auto v = read_integers<11>(kOp, integers);
  if (v[3] < 0 || v[3] > static_cast<int>(Activation::kHardswish)) {
    fail(kOp, "activation must be one from 0 to 4");
  }
  return {require_integer(kOp, "kernel_h", v[0], 1),
          require_integer(kOp, "kernel_w", v[1], 1),
          read_window(kOp, &v[5]),
          v[2] != 0,
          static_cast<Activation>(v[3]),
          read_threads(kOp, v[4])};
}

// [F, C, kernel_h * kernel_w, 1]
void check_weight(const TensorView& weight, const SamplerConv2d& conv) {
  if (weight.ndim != 4 || weight.shape[3] != 1 || weight.shape[0] < 1 || weight.shape[1] < 1 ||
      weight.shape[2] != conv.kernel_h * conv.kernel_w) {
    fail(kOp, "weight must be [F, C, kernel_h * kernel_w, 1] with channels");
  }
  if (!is_floating_point(weight.dtype)) fail(kOp, "weight must be a floating-point tensor");
  require_on_cpu(kOp, weight);
}

// [N, channels, H, W] with the channels side by side.
void require_map(const TensorView& t, std::int64_t channels, const TensorView& weight) {
  if (t.ndim != 4 || t.shape[1] != channels) {
    fail(kOp, std::string(t.name) + " must have 4 dimensions and " + std::to_string(channels) +
                  " channels");
  }
  if (t.shape[1] > 1 && t.stride[1] != 1) fail(kOp, std::string(t.name) + " must be channels_last");
  require_like(kOp, t, weight);
}

void require_vector(const std::optional<TensorArg>& t, std::int64_t count) {
  if (!t) return;
  require_shape(kOp, *t, {count});
  require_contiguous(kOp, *t);
  require_on_cpu(kOp, *t);
  if (!is_floating_point((*t)->dtype)) {
    fail(kOp, std::string((*t)->name) + " must be a floating-point tensor");
  }
}

// Whether y is as large as the maximum of 2 x 2 pixels of x.
bool is_half(const TensorView& y, const TensorView& x) {
  return y.shape[2] == (x.shape[2] + 1) / 2 && y.shape[3] == (x.shape[3] + 1) / 2;
}

void forward(py::handle x_, py::handle weight_, py::handle packed_, py::handle bias_,
             py::handle residual_, py::handle scale_, py::handle shift_, py::handle y_,
             const py::tuple& integers) {
  const SamplerConv2d conv = read_problem(integers);
  const TensorArg x(x_, "x"), weight(weight_, "weight"), y(y_, "y");
  const auto packed = optional_tensor(packed_, "packed"), bias = optional_tensor(bias_, "bias");
  const auto residual = optional_tensor(residual_, "residual");
  const auto scale = optional_tensor(scale_, "scale"), shift = optional_tensor(shift_, "shift");
  check_weight(weight, conv);
  const std::int64_t outputs = weight->shape[0], inputs = weight->shape[1];
  if (packed) {
    require_packed(kOp, **packed, weight, cpu::factorized_conv2d_packed_elements(weight, false));
  }
  require_vector(bias, outputs);
  require_vector(scale, inputs);
  require_vector(shift, inputs);
  if (scale.has_value() != shift.has_value()) fail(kOp, "scale and shift must come together");
  require_map(x, inputs, weight);
  require_map(y, scale ? outputs + inputs : outputs, weight);
  if (y->shape[0] != x->shape[0]) fail(kOp, "y must have the batch size of x");
  if (x->shape[2] < 1 || x->shape[3] < 1) fail(kOp, "x must have pixels");
  if (scale && (conv.transposed || residual || !is_half(y, x))) {
    fail(kOp, "pooling needs a y of half the size of x, no transposed weight and no residual");
  }
  if (residual) {
    require_map(*residual, outputs, weight);
    require_shape(kOp, *residual, {y->shape[0], y->shape[1], y->shape[2], y->shape[3]});
  }
  const Line line{weight, view_or_null(packed), view_or_null(bias), true};
  const Pooling pooling{view_or_null(scale), view_or_null(shift)};
  const py::gil_scoped_release no_gil;
  cpu::sampler_conv2d_forward(x, line, view_or_null(residual), scale ? &pooling : nullptr, y, conv);
}

}  // namespace

void bind_sampler_conv2d(py::module_& m) {
  m.def("sampler_conv2d_forward", &forward, py::arg("x"), py::arg("weight"), py::arg("packed"),
        py::arg("bias"), py::arg("residual"), py::arg("scale"), py::arg("shift"), py::arg("y"),
        py::arg("problem"), "Writes y: a convolution that changes the size of a map.");
}

}  // namespace pyeff::bindings
