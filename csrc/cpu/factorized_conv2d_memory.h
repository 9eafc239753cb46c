#pragma once
// What a call makes of its weights and vectors before its threads start.

#include "cpu/factorized_conv2d_call.h"
#include "cpu/factorized_conv2d_weights.h"
#include "cpu/nested_conv2d_types.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

template <typename A>
A number_at(const TensorView& t, Index i) {
  A value{};
  for_dtype(t.dtype,
            [&](auto type) { value = static_cast<A>(widen(t.as<const decltype(type)>()[i])); });
  return value;
}

// Weights and vectors of the lines of one call, in memory of the calling thread.
template <typename T>
class CallMemory {
 public:
  using A = Accumulator<T>;

  CallMemory(const Line& first, const Line* second, bool winograd) : winograd_(winograd) {
    Index weights = 0, vectors = 0;
    for (const Line* line : {&first, second}) {
      if (line == nullptr) continue;
      const LineLayout layout = line_layout(*line, winograd);
      if (line->packed == nullptr) weights += layout.elements();
      vectors += 3 * layout.lanes();
    }
    weights_ = factorized_scratch().weights.get<A>(weights);
    vectors_ = factorized_scratch().vectors.get<A>(vectors);
  }

  // `epilogue` may be null: then only the bias and the activation follow.
  LineKernel<A> kernel(const Line& line, Activation activation, const Epilogue* epilogue) {
    LineKernel<A> kernel{};
    kernel.layout = line_layout(line, winograd_);
    kernel.activation = activation;
    if (line.packed != nullptr) {
      kernel.weights = line.packed->as<const A>();
    } else {
      pack_weight(line_weight_of<T>(line), kernel.layout, weights_);
      kernel.weights = weights_;
      weights_ += kernel.layout.elements();
    }
    if (kernel.layout.paired) kernel.pairs = kernel.weights + kernel.layout.wide_elements();
    const TensorView* scale = epilogue == nullptr ? nullptr : epilogue->scale;
    const TensorView* shift = epilogue == nullptr ? nullptr : epilogue->shift;
    const Index lanes = kernel.layout.lanes();
    if (scale != nullptr) {
      kernel.init = vector(line.bias, nullptr, kernel.layout.out, lanes);
      kernel.scale = vector(scale, nullptr, kernel.layout.out, lanes);
      kernel.shift = vector(shift, nullptr, kernel.layout.out, lanes);
    } else {
      kernel.init = vector(line.bias, shift, kernel.layout.out, lanes);
    }
    return kernel;
  }

 private:
  // a + b, where one that is null counts as zero, and zero in the lanes past `count`.
  const A* vector(const TensorView* a, const TensorView* b, Index count, Index lanes) {
    A* to = vectors_;
    vectors_ += lanes;
    for (Index i = 0; i < lanes; ++i) to[i] = A(0);
    for (const TensorView* t : {a, b}) {
      for (Index i = 0; t != nullptr && i < count; ++i) to[i] += number_at<A>(*t, i);
    }
    return to;
  }

  bool winograd_;
  A *weights_, *vectors_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
