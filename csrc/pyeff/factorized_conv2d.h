#pragma once
// factorized_conv2d: a pair of 1-D convolutions, n x 1 and 1 x n in either order, with everything
// around them:
//   y = outer(scale * (second(inner(first(x) + b_first)) + b_second) + shift + residual)
// Alvarez and Petersson, "DecomposeMe: Simplifying ConvNets for End-to-End Learning", 2016; Romera
// et al., "ERFNet: Efficient Residual Factorized ConvNet for Real-Time Semantic Segmentation",
// T-ITS 2018.
//
//   x [N, C, H, W]   first [L, C, n, 1] or [L, C, 1, n]   second [F, L, 1, n] or [F, L, n, 1]
//   y, residual [N, F, H', W']   b_first [L]   b_second, scale, shift [F]
// Maps are read and written by their strides; the channel stride is 1.

#include "pyeff/activation.h"
#include "pyeff/tensor_view.h"

namespace pyeff {

// A 1-D convolution, n x 1 (vertical) or 1 x n. packed and bias may be null.
struct Line {
  TensorView weight;
  const TensorView* packed;
  const TensorView* bias;
  bool vertical;
  bool transposed = false;  // channels changed places and taps in reverse: for gradients
};

// What follows the last convolution. Each pointer may be null.
struct Epilogue {
  const TensorView *scale, *shift, *residual;
  Activation activation;
};

// The vertical line has stride (stride, 1), padding (padding, 0), dilation (dilation, 1), the
// horizontal one (1, stride), (0, padding), (1, dilation). Rows and columns outside of a map count
// as zero, so padding at the bottom and the right follows from the size of y.
struct FactorizedConv2d {
  std::int64_t stride, padding, dilation;
  Activation inner;
  bool winograd;  // cpu: only where line_can_winograd() for both and stride is 1
  bool tf32;      // cuda: products of float32 are rounded to TF32
  int threads;    // cpu
};

namespace cpu {

// Winograd's F(4, 3) needs three taps and float32.
bool line_can_winograd(const TensorView& weight);

// The packed form of one line, cpu/factorized_conv2d_layout.h; float32 for every weight but
// float64, which stays float64. A form for Winograd serves no direct convolution and vice versa.
std::int64_t factorized_conv2d_packed_elements(const TensorView& weight, bool winograd);
void factorized_conv2d_pack(const TensorView& weight, bool winograd, const TensorView& packed);

// Without `second` a single 1-D convolution with its epilogue; `conv.inner` is not used then.
// Without a packed copy of a line it is packed for this call.
void factorized_conv2d_forward(const TensorView& x, const Line& first, const Line* second,
                               const Epilogue& epilogue, const TensorView& y,
                               const FactorizedConv2d& conv);

// Gradient of a line's input, for stride 1 and a padding of at most dilation * (n - 1); every
// element is written. Unless `before` is null, it is multiplied by the derivative of `conv.inner`
// there: the input was inner(before), or for relu and relu6 also `before` itself.
void factorized_conv2d_grad_input(const TensorView& grad_y, const Line& line,
                                  const TensorView* before, const TensorView& grad_x,
                                  const FactorizedConv2d& conv);

// Gradients of a line's weight, with any strides, and, unless null, of its bias [O]; any stride.
// Every element is written.
void factorized_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                                   const Line& grad_line, const TensorView* grad_bias,
                                   const FactorizedConv2d& conv);

}  // namespace cpu

// Lines' packed forms play no part; a weight is read fastest where what a sum runs over is
// innermost and its size a multiple of 16 bytes. Maps have fewer than 2^30 pixels, and any stride
// and padding. All tensors but vectors, which may be float32, have one dtype.
namespace cuda {

// Whether one kernel can run the pair: stride 1, at most 128 channels behind either convolution (64
// in float64 and in float32 without TF32), and a tile of x that fits into shared memory.
bool factorized_conv2d_fits(const Line& first, const Line& second, const TensorView& y,
                            const FactorizedConv2d& conv);
// Only where it fits.
void factorized_conv2d_forward(const TensorView& x, const Line& first, const Line& second,
                               const Epilogue& epilogue, const TensorView& y,
                               const FactorizedConv2d& conv, void* stream);

// As in cpu::, for any stride and padding.
void factorized_conv2d_line_forward(const TensorView& x, const Line& line, const Epilogue& epilogue,
                                    const TensorView& y, const FactorizedConv2d& conv,
                                    void* stream);
void factorized_conv2d_line_grad_input(const TensorView& grad_y, const Line& line,
                                       const TensorView* before, const TensorView& grad_x,
                                       const FactorizedConv2d& conv, void* stream);

// `partial` is a workspace of that many elements, in the accumulator's type.
std::int64_t factorized_conv2d_partial_elements(const TensorView& grad_y, const TensorView& weight,
                                                const FactorizedConv2d& conv);
void factorized_conv2d_line_grad_weight(const TensorView& grad_y, const TensorView& x,
                                        const Line& grad_line, const TensorView& partial,
                                        const FactorizedConv2d& conv, void* stream);

}  // namespace cuda
}  // namespace pyeff
