#pragma once
// top_k_routes: index[n] = the k branches of the highest scores[n], by falling score, ties to the
// lower number. scores [N, B] with any strides, index [N, k], int32, contiguous.

#include "pyeff/tensor_view.h"

namespace pyeff::cpu {

// Throws std::invalid_argument at the first NaN.
void top_k_routes(const TensorView& scores, const TensorView& index);

}  // namespace pyeff::cpu
