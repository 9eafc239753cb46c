#pragma once
// Activations and their derivatives, in the type of a sum.

#include <cmath>

#include "cuda/common.cuh"
#include "pyeff/activation.h"

namespace pyeff::cuda {

// NaN stays NaN, as in torch.
template <typename A>
__device__ A activated(A v, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return v < A(0) ? A(0) : v;
    case Activation::kRelu6:
      return v < A(0) ? A(0) : v > A(6) ? A(6) : v;
    case Activation::kSilu:
      return v / (A(1) + std::exp(-v));
    case Activation::kHardswish: {
      const A gate = v + A(3);
      return v * (gate < A(0) ? A(0) : gate > A(6) ? A(6) : gate) / A(6);
    }
    default:
      return v;
  }
}

// grad times the derivative at `at`; for relu and relu6 `at` may also be the result there.
template <typename A>
__device__ A through_activation(A grad, A at, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return at <= A(0) ? A(0) : grad;
    case Activation::kRelu6:
      return at <= A(0) || at >= A(6) ? A(0) : grad;
    case Activation::kSilu: {
      const A s = A(1) / (A(1) + std::exp(-at));
      return grad * s * (A(1) + at * (A(1) - s));
    }
    case Activation::kHardswish:
      if (at <= A(-3)) return A(0);
      return at < A(3) ? grad * (at / A(3) + A(0.5)) : grad;
    default:
      return grad;
  }
}

}  // namespace pyeff::cuda
