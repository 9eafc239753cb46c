#pragma once
// The arguments of factorized_conv2d's bindings.

#include "bindings/branch_arg.h"
#include "pyeff/factorized_conv2d.h"

namespace pyeff::bindings {

// csrc/bindings/factorized_conv2d_cuda.cpp
void bind_factorized_conv2d_cuda(py::module_& m);

inline Activation read_activation(const char* op, std::int64_t number) {
  if (number < 0 || number > static_cast<int>(Activation::kHardswish)) {
    fail(op, "inner and outer must be activations from 0 to 4");
  }
  return static_cast<Activation>(number);
}

// (stride, padding, dilation, inner, outer, winograd, threads); in place of winograd, CUDA reads
// whether products of float32 are rounded to TF32.
struct Problem {
  Problem(const char* op, const py::tuple& integers) {
    const auto v = read_integers<7>(op, integers);
    outer = read_activation(op, v[4]);
    conv = {require_integer(op, "stride", v[0], 1),
            require_integer(op, "padding", v[1], 0),
            require_integer(op, "dilation", v[2], 1),
            read_activation(op, v[3]),
            v[5] != 0,
            v[5] != 0,
            read_threads(op, v[6])};
  }

  FactorizedConv2d conv;
  Activation outer;
};

// [O, I, n, 1] or [O, I, 1, n]
inline void check_weight(const char* op, const TensorView& weight) {
  if (weight.ndim != 4 || (weight.shape[2] != 1 && weight.shape[3] != 1)) {
    fail(op, std::string(weight.name) + " must be [O, I, n, 1] or [O, I, 1, n]");
  }
  for (int d = 0; d < weight.ndim; ++d) {
    if (weight.shape[d] < 1) fail(op, std::string(weight.name) + " must have channels and taps");
  }
  if (!is_floating_point(weight.dtype)) {
    fail(op, std::string(weight.name) + " must be a floating-point tensor");
  }
}

// [N, C, H, W] with the channels side by side.
inline void require_map(const char* op, const TensorView& t, const TensorView& like) {
  if (t.ndim != 4) fail(op, std::string(t.name) + " must have 4 dimensions");
  if (t.shape[1] > 1 && t.stride[1] != 1) fail(op, std::string(t.name) + " must be channels_last");
  require_like(op, t, like);
}

// [count], of any floating-point type.
inline void require_vector(const char* op, const std::optional<TensorArg>& t, std::int64_t count,
                           const TensorView& like) {
  if (!t) return;
  require_shape(op, *t, {count});
  require_contiguous(op, *t);
  if ((*t)->device != like.device || (*t)->device_index != like.device_index) {
    fail(op, std::string((*t)->name) + " must be on the device of " + like.name);
  }
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
    require_vector(op, bias, weight->shape[0], weight);
  }

  Line line(bool vertical) const {
    return {*weight, view_or_null(packed), view_or_null(bias), vertical, false};
  }
  bool vertical() const { return weight->shape[3] == 1; }
  bool horizontal() const { return weight->shape[2] == 1; }
  std::int64_t taps() const { return weight->shape[2] * weight->shape[3]; }

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
    require_vector(op, scale, y.shape[1], y);
    require_vector(op, shift, y.shape[1], y);
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
inline void check_maps(const char* op, const TensorView& x, const TensorView& y,
                       const TensorView& weight, std::int64_t features) {
  require_map(op, x, weight);
  require_map(op, y, weight);
  if (x.shape[1] != weight.shape[1]) fail(op, "x must have the input channels of the weight");
  if (y.shape[0] != x.shape[0] || y.shape[1] != features) {
    fail(op, "y must have the batch size of x and the output channels of the weight");
  }
}

// A line changes the size along itself only.
inline void check_across(const char* op, const Line& line, const TensorView& x,
                         const TensorView& y) {
  const int across = line.vertical ? 3 : 2;
  if (x.shape[across] != y.shape[across]) {
    fail(op, std::string(y.name) + " must have the size of " + x.name + " across the line");
  }
}

// Only a single tap lies both ways.
inline void check_way(const char* op, const LineArgs& line, bool vertical) {
  if (vertical ? line.vertical() : line.horizontal()) return;
  fail(op, std::string(line.weight->name) + " must be " + (vertical ? "n x 1" : "1 x n"));
}

// Where the derivative of an activation is taken, like the gradient.
inline void check_before(const char* op, const std::optional<TensorArg>& before,
                         const TensorView& grad_x) {
  if (!before) return;
  require_map(op, *before, grad_x);
  const auto& shape = grad_x.shape;
  require_shape(op, *before, {shape[0], shape[1], shape[2], shape[3]});
}

// Two lines, n x 1 and 1 x n, of which the second reads what the first writes. Returns whether the
// first one is the vertical one.
inline bool check_pair(const char* op, const LineArgs& first, const LineArgs& second) {
  require_like(op, second.weight, first.weight);
  if (second.weight->shape[1] != first.weight->shape[0]) {
    fail(op, "w_second must have as many input channels as w_first has output channels");
  }
  const bool vertical_first = first.vertical() && second.horizontal();
  if (first.taps() != second.taps() ||
      !(vertical_first || (first.horizontal() && second.vertical()))) {
    fail(op, "w_first and w_second must be n x 1 and 1 x n, in either order");
  }
  return vertical_first;
}

}  // namespace pyeff::bindings
