#pragma once
// branch_conv2d: y[n, j] = conv2d(x[n] or x[n, j], weight[index[n, j]], bias[index[n, j]]), k of B
// branches for every image. Mullapudi et al., "HydraNets: Specialized Dynamic Architectures for
// Efficient Inference", CVPR 2018.
//
//   x [N, C, H, W], shared by the k branches of an image, or [N, k, C, H, W]
//   weight [B, O, C / groups, kh, kw]   bias [B, O]   index [N, k], int32   y [N, k, O, H', W']
// Maps are read and written by their strides; the channel stride is 1. The rest is contiguous.

#include "pyeff/conv_window.h"
#include "pyeff/tensor_view.h"

namespace pyeff {

struct BranchConv2d {
  ConvWindow window;
  std::int64_t groups;
  int threads;
  bool tf32;  // cuda: products of float32 are rounded to TF32
};

namespace cpu {

// The packed form of all branches; cpu/branch_conv2d_layout.h describes it.
// float32 for every weight but float64, which stays float64.
std::int64_t branch_conv2d_packed_elements(const TensorView& weight, std::int64_t groups);
void branch_conv2d_pack(const TensorView& weight, const TensorView& packed, std::int64_t groups,
                        int threads);

// packed or bias may be null. Without a packed copy, each thread packs the branches that its pairs
// use, one at a time.
void branch_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* packed,
                           const TensorView* bias, const TensorView& index, const TensorView& y,
                           const BranchConv2d& conv);

// Gradient of x; one that the branches of an image share is summed in the order of the branches'
// numbers, then of j. Every element is written.
void branch_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& index, const TensorView& grad_x,
                              const BranchConv2d& conv);

// Gradients of weight and, unless null, of bias; exactly zero for branches that no image chose.
// Every element is written.
void branch_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& index, const TensorView& grad_weight,
                               const TensorView* grad_bias, const BranchConv2d& conv);

}  // namespace cpu

// Weights have their input channels (of grad_input their output channels, weight [B, C, O / groups,
// kh, kw]) side by side. Routes to no branch give zeros and get zero gradients.
namespace cuda {

void branch_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* bias,
                           const TensorView& index, const TensorView& y, const BranchConv2d& conv,
                           void* stream);
void branch_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& index, const TensorView& grad_x,
                              const BranchConv2d& conv, void* stream);

// grad_weight [B, O, C / groups, kh, kw], contiguous. order and offsets are the pairs by branch,
// from branch_plan (pyeff/top_k_routes.h), of k routes an image.
void branch_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& order, const TensorView& offsets,
                               const TensorView& grad_weight, const TensorView* grad_bias,
                               const BranchConv2d& conv, void* stream);

}  // namespace cuda
}  // namespace pyeff
