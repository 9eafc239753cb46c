#pragma once
// Checks that every binding with routes shares.

#include "bindings/integer_arg.h"

namespace pyeff::bindings {

// [N, k] with k at least 1, int32, contiguous.
inline void require_index(const char* op, const TensorView& index) {
  if (index.ndim != 2 || index.shape[1] < 1) {
    fail(op, "routes.index must be [N, k] with k at least 1");
  }
  if (index.dtype != Dtype::kInt32) fail(op, "routes.index must be int32");
  require_contiguous(op, index);
  require_on_cpu(op, index);
}

// Kernels use the values as they are.
inline void require_branches(const char* op, const TensorView& index, std::int64_t branches) {
  const auto* value = index.as<const std::int32_t>();
  const std::int64_t k = index.shape[1], count = index.shape[0] * k;
  for (std::int64_t i = 0; i < count; ++i) {
    if (value[i] >= 0 && value[i] < branches) continue;
    fail(op, "routes.index must name branches from 0 to " + std::to_string(branches - 1) +
                 ", got " + std::to_string(value[i]) + " at [" + std::to_string(i / k) + ", " +
                 std::to_string(i % k) + "]");
  }
}

}  // namespace pyeff::bindings
