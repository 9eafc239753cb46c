#pragma once
// Convolutions that change the size of a map, with what stands beside them and follows:
//   without pooling  y = activation(conv(x) + bias + residual)
//   with pooling     y = activation(cat(conv(x) + bias, scale * pool(x) + shift))
// where conv may be a transposed one, and pool is the largest of 2 x 2 pixels, clipped at the
// border. The layers between the stages of ERFNet: Romera, Alvarez, Bergasa, Arroyo, "ERFNet:
// Efficient Residual Factorized ConvNet for Real-Time Semantic Segmentation", T-ITS 2018.
//
//   x [N, C, H, W]   y, residual [N, F, H', W']
// Maps are read and written by their strides; the channel stride is 1.

#include "pyeff/activation.h"
#include "pyeff/conv_window.h"
#include "pyeff/factorized_conv2d.h"
#include "pyeff/tensor_view.h"

namespace pyeff {

// `window` is that of the convolution, or of the one whose transpose is meant.
struct SamplerConv2d {
  std::int64_t kernel_h, kernel_w;
  ConvWindow window;
  bool transposed;
  Activation activation;
  int threads;
};

// Each [C].
struct Pooling {
  const TensorView *scale, *shift;
};

namespace cpu {

// `line` holds the weight as [F, C, kernel_h * kernel_w, 1], packed as a direct line is; `residual`
// and `pooling` may be null, and one of them is. Every element of y is written.
void sampler_conv2d_forward(const TensorView& x, const Line& line, const TensorView* residual,
                            const Pooling* pooling, const TensorView& y, const SamplerConv2d& conv);

}  // namespace cpu
}  // namespace pyeff
