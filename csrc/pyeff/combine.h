#pragma once
// combine: out[n] = bias + sum_j route_weight[n, j] projection[index[n, j]] y[n, j], the last layer
// of a network whose branches were routed.
//
//   y [N, k, F], feature stride 1   projection [B, O, F]   bias [O]   index [N, k], int32
//   route_weight [N, k]   out [N, O]; all but y contiguous

#include "pyeff/tensor_view.h"

namespace pyeff {
namespace cpu {

// packed, from branch_conv2d_pack, and bias may be null.
void combine_forward(const TensorView& y, const TensorView& projection, const TensorView* packed,
                     const TensorView* bias, const TensorView& index,
                     const TensorView& route_weight, const TensorView& out, int threads);

// grad_y[n, j] = route_weight[n, j] v and grad_route_weight[n, j] = v . y[n, j], with
// v = projection[index[n, j]]^T grad_out[n]. Either output may be null.
void combine_grad_input(const TensorView& grad_out, const TensorView& y,
                        const TensorView& projection, const TensorView& index,
                        const TensorView& route_weight, const TensorView* grad_y,
                        const TensorView* grad_route_weight, int threads);

// grad_projection[b] = sum of route_weight[n, j] grad_out[n] y[n, j]^T over the pairs of branch b.
void combine_grad_projection(const TensorView& grad_out, const TensorView& y,
                             const TensorView& index, const TensorView& route_weight,
                             const TensorView& grad_projection, int threads);

}  // namespace cpu

// Routes to no branch add nothing and get zero gradients.
namespace cuda {

void combine_forward(const TensorView& y, const TensorView& projection, const TensorView* bias,
                     const TensorView& index, const TensorView& route_weight, const TensorView& out,
                     void* stream);
void combine_grad_input(const TensorView& grad_out, const TensorView& y,
                        const TensorView& projection, const TensorView& index,
                        const TensorView& route_weight, const TensorView* grad_y,
                        const TensorView* grad_route_weight, void* stream);

// order and offsets are the pairs by branch, from branch_plan (pyeff/top_k_routes.h).
void combine_grad_projection(const TensorView& grad_out, const TensorView& y,
                             const TensorView& order, const TensorView& offsets,
                             const TensorView& route_weight, const TensorView& grad_projection,
                             void* stream);

}  // namespace cuda
}  // namespace pyeff
