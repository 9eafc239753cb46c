#pragma once
// top_k_routes: index[n] = the k branches of the highest scores[n], by falling score, ties to the
// lower number. scores [N, B] with any strides, index [N, k], int32, contiguous.

#include "pyeff/tensor_view.h"

namespace pyeff {
namespace cpu {

// Throws std::invalid_argument at the first NaN.
void top_k_routes(const TensorView& scores, const TensorView& index);

}  // namespace cpu

namespace cuda {

// weight [N, k]: the softmax over the kept scores, or ones. A NaN counts as the lowest score, and
// makes the softmax of its row NaN: every index names a branch.
void top_k_routes(const TensorView& scores, const TensorView& index, const TensorView& weight,
                  bool softmax, void* stream);

// grad_scores[n, index[n, j]] = weight[n, j] (g[n, j] - sum_i weight[n, i] g[n, i]) for the softmax
// of routes that top_k_routes wrote, and zero for the branches that were not kept.
// grad_weight, index, weight [N, k], grad_scores [N, B], all contiguous.
void top_k_routes_grad(const TensorView& grad_weight, const TensorView& index,
                       const TensorView& weight, const TensorView& grad_scores, void* stream);

// The (image, branch) pairs n * k + j by branch, those of a branch in their own order: the pairs of
// branch b are order[offsets[b]] to order[offsets[b + 1] - 1]. Routes to no branch come last.
// order [N * k], offsets [B + 1], int32, contiguous. At most branch_plan_most_branches() branches.
void branch_plan(const TensorView& index, const TensorView& order, const TensorView& offsets,
                 void* stream);
std::int64_t branch_plan_most_branches();

}  // namespace cuda
}  // namespace pyeff
