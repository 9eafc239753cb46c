// factorized_conv2d: packing, forward pass and gradient of a line's input.
//   middle[n, l, h, w] = inner(b_first[l] + sum_{c, u} x[n, c, h s + u d - p, w] W[l, c, u])
//   z[n, f, h, w] = b_second[f] + sum_{l, v} middle[n, l, h, w s + v d - p] W[f, l, v]
//   y = outer(scale z + shift + residual)
// for vertical first, and likewise for horizontal first. Every output element is summed by one
// thread in a fixed order, whatever the number of threads.

#include "cpu/factorized_conv2d_direct.h"
#include "cpu/factorized_conv2d_dot.h"
#include "cpu/factorized_conv2d_kernels.h"
#include "cpu/factorized_conv2d_memory.h"
#include "cpu/factorized_conv2d_winograd_dot.h"
#include "cpu/factorized_conv2d_winograd_pair.h"

namespace pyeff::cpu::PYEFF_ISA {

void factorized_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                                   const Line& grad_line, const TensorView* grad_bias,
                                   const FactorizedConv2d& conv);

namespace {

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
      if (conv.winograd) return run_winograd<DotWinogradLine>(call, conv.threads);
      return run_direct<DotLineConv>(call, conv.threads);
    }
#endif
    auto call = make_call<T, T>(x, first, second, epilogue, y, conv);
    prepare(call);
    if constexpr (std::is_same_v<T, float>) {
      if (conv.winograd) return run_winograd<WinogradLine>(call, conv.threads);
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
