#pragma once
// Checks that every binding with routes shares.

#include "bindings/integer_arg.h"

namespace pyeff::bindings {

// [N, k] with k at least 1, int32, contiguous, on any device.
inline void require_routes(const char* op, const TensorView& index) {
  if (index.ndim != 2 || index.shape[1] < 1) {
    fail(op, "routes.index must be [N, k] with k at least 1");
  }
  if (index.dtype != Dtype::kInt32) fail(op, "routes.index must be int32");
  require_contiguous(op, index);
}

inline void require_index(const char* op, const TensorView& index) {
  require_routes(op, index);
  require_on_cpu(op, index);
}

// The GPU kernels number pairs and branches by int.
inline void require_countable(const char* op, const char* what, std::int64_t count) {
  if (count >= kLargestInteger) {
    fail(op, std::string(what) + " must be fewer than " + std::to_string(kLargestInteger));
  }
}

// The launch plan that branch_plan wrote for routes of `pairs` pairs.
inline void require_plan(const char* op, const TensorView& order, const TensorView& offsets,
                         std::int64_t pairs, std::int64_t branches) {
  require_shape(op, order, {pairs});
  require_shape(op, offsets, {branches + 1});
  for (const TensorView* t : {&order, &offsets}) {
    if (t->dtype != Dtype::kInt32) fail(op, std::string(t->name) + " must be int32");
    require_contiguous(op, *t);
  }
  require_countable(op, "pairs", pairs);
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
