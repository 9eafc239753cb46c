// factorized_conv2d: packing, forward pass and gradient of a line's input.
//   middle[n, l, h, w] = inner(b_first[l] + sum_{c, u} x[n, c, h s + u d - p, w] W[l, c, u])
//   z[n, f, h, w] = b_second[f] + sum_{l, v} middle[n, l, h, w s + v d - p] W[f, l, v]
//   y = outer(scale z + shift + residual)
// for vertical first, and likewise for horizontal first. Every output element is summed by one
// thread in a fixed order, whatever the number of threads.

#include "cpu/factorized_conv2d_direct.h"
#include "cpu/factorized_conv2d_dot.h"
#include "cpu/factorized_conv2d_kernels.h"
#include "cpu/factorized_conv2d_weights.h"
#include "cpu/factorized_conv2d_winograd_pair.h"
#include "cpu/nested_conv2d_types.h"

namespace pyeff::cpu::PYEFF_ISA {

void factorized_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                                   const Line& grad_line, const TensorView* grad_bias,
                                   const FactorizedConv2d& conv);

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

// T is the type of the maps in memory, W that of the weights.
template <typename T, typename W>
PairCall<T> make_call(const TensorView& x, const Line& first, const Line* second,
                      const Epilogue& epilogue, const TensorView& y, const FactorizedConv2d& conv) {
  CallMemory<W> memory(first, second, conv.winograd);
  PairCall<T> call{};
  call.x = image_of<const T>(x);
  call.y = image_of<T>(y);
  if (epilogue.residual != nullptr) call.residual = image_of<const T>(*epilogue.residual);
  call.paired = second != nullptr;
  call.vertical_first = first.vertical;
  call.stride = conv.stride;
  call.padding = conv.padding;
  call.dilation = conv.dilation;
  if (second == nullptr) {
    call.first = memory.kernel(first, epilogue.activation, &epilogue);
  } else {
    call.first = memory.kernel(first, conv.inner, nullptr);
    call.second = memory.kernel(*second, epilogue.activation, &epilogue);
  }
  return call;
}

// Runs the call; prepare(call) may add to it.
template <typename F>
void run(const TensorView& x, const Line& first, const Line* second, const Epilogue& epilogue,
         const TensorView& y, const FactorizedConv2d& conv, const F& prepare) {
  for_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, BFloat16>) {
      auto call = make_call<std::uint16_t, T>(x, first, second, epilogue, y, conv);
      prepare(call);
      return run_direct<DotLineConv>(call, conv.threads);
    }
#endif
    auto call = make_call<T, T>(x, first, second, epilogue, y, conv);
    prepare(call);
    if constexpr (std::is_same_v<T, float>) {
      if (conv.winograd) return run_winograd(call, conv.threads);
    }
    run_direct<LineConv<Accumulator<T>>>(call, conv.threads);
  });
}

void factorized_conv2d_pack(const TensorView& weight, bool winograd, const TensorView& packed) {
  for_dtype(weight.dtype, [&](auto type) {
    using T = decltype(type);
    pack_weight(line_weight_of<T>(weight), line_layout(weight, winograd),
                packed.as<Accumulator<T>>());
  });
}

void factorized_conv2d_forward(const TensorView& x, const Line& first, const Line* second,
                               const Epilogue& epilogue, const TensorView& y,
                               const FactorizedConv2d& conv) {
  run(x, first, second, epilogue, y, conv, [](auto&) {});
}

void factorized_conv2d_grad_input(const TensorView& grad_y, const Line& line,
                                  const TensorView* before, const TensorView& grad_x,
                                  const FactorizedConv2d& conv) {
  Line turned = line;
  turned.transposed = true;
  FactorizedConv2d turned_conv = conv;
  const Index taps = line.weight.shape[2] * line.weight.shape[3];
  turned_conv.padding = conv.dilation * (taps - 1) - conv.padding;
  const Epilogue nothing{nullptr, nullptr, nullptr, Activation::kNone};
  run(grad_y, turned, nullptr, nothing, grad_x, turned_conv, [&](auto& call) {
    if (before == nullptr) return;
    call.gate = image_of<std::remove_pointer_t<decltype(call.gate.data)>>(*before);
    call.gate_activation = conv.inner;
  });
}

}  // namespace

extern const FactorizedConv2dKernels factorized_conv2d_kernels{
    &factorized_conv2d_pack, &factorized_conv2d_forward, &factorized_conv2d_grad_input,
    &factorized_conv2d_grad_weight};

}  // namespace pyeff::cpu::PYEFF_ISA
