#pragma once
// nested_conv2d: y = conv2d(x, weight[out, in], bias[out]) for a selection of the channels of one
// full weight, which is read where it lies. Kim et al., "Deep Virtual Networks for Memory
// Efficient Inference of Multiple Tasks", CVPR 2019.
//
// Shapes, with O, I the channels of the full layer, o, i the selected ones, g the active groups:
//   x [N, i, H, W]   weight [O, I / groups, kh, kw]   bias [O]   y [N, o, H', W']
// x, y and their gradients are read and written by their strides; the channel stride is 1.

#include "pyeff/conv_window.h"
#include "pyeff/tensor_view.h"

namespace pyeff {

// The channels of one side of the full layer that take part.
struct ChannelSelection {
  std::int64_t lo;            // first channel of the range; unused with an index
  std::int64_t count;         // how many channels
  const std::int64_t* index;  // [count] channel numbers, or null for the range [lo, lo + count)
};

struct NestedConv2d {
  ChannelSelection in, out;  // in full channels; with groups > 1 both cover the same whole groups
  ConvWindow window;
  std::int64_t groups;  // of the full layer
  int threads;
};

namespace cpu {

// The packed form of a whole weight serves every selection: panels of kPanel output channels,
// [groups][ceil(O / groups / kPanel)][kh * kw][I / groups][kPanel], zero-filled at the end; of a
// depth-wise weight [kh * kw][channels and padding].
// float32 for every weight but float64, which stays float64.
std::int64_t nested_conv2d_packed_elements(const TensorView& weight, std::int64_t groups);
void nested_conv2d_pack(const TensorView& weight, const TensorView& packed, std::int64_t groups,
                        int threads);

// packed or bias may be null. Without a packed copy, or with an index of outputs, each panel is
// gathered from the weight into thread-local scratch as it is used; with an index of inputs the
// panel's rows are copied together from the packed form.
void nested_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* packed,
                           const TensorView* bias, const TensorView& y, const NestedConv2d& conv);

// Gradient of x; every element is written.
void nested_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& grad_x, const NestedConv2d& conv);

// Gradient of the full weight; exactly zero outside the selection. Every element is written.
void nested_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& grad_weight, const NestedConv2d& conv);

}  // namespace cpu

// How a GPU sums; every choice gives the same up to rounding.
struct NestedConv2dPlan {
  bool tf32;            // float32 factors rounded to ten bits, for the tensor cores
  bool large;           // tiles of 128 x 128, else 64 x 64
  std::int64_t shares;  // into how many parts the terms are split; more than one need a workspace
};

namespace cuda {

// Index tensors lie on the GPU; a number outside of the layer reads zeros and writes nothing.
// workspace is null with one share, else [shares, N, H', W', o] in the type of the sums.
void nested_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* bias,
                           const TensorView& y, const TensorView* workspace,
                           const NestedConv2d& conv, const NestedConv2dPlan& plan, void* stream);

// workspace [shares, N, H, W, i]. Every element of grad_x is written.
void nested_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& grad_x, const TensorView* workspace,
                              const NestedConv2d& conv, const NestedConv2dPlan& plan, void* stream);

// workspace [shares, o, kh, kw, i / groups]. Writes the selected part of the gradient alone.
void nested_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& grad_weight, const TensorView* workspace,
                               const NestedConv2d& conv, const NestedConv2dPlan& plan,
                               void* stream);

}  // namespace cuda
}  // namespace pyeff
