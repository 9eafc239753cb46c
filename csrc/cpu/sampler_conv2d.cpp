// sampler_conv2d: the forward pass, pyeff/sampler_conv2d.h. Every output element is summed by one
// thread in a fixed order, whatever the number of threads.

#include "cpu/factorized_conv2d_dot.h"
#include "cpu/factorized_conv2d_memory.h"
#include "cpu/sampler_conv2d_kernels.h"
#include "cpu/sampler_conv2d_rows.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Fewer channels would leave dot products of pairs of them half empty, or cost a copy.
constexpr Index kFewChannels = 8;

const Plan& plan_of(const TensorView& y, const SamplerConv2d& conv) {
  const Index rows = y.shape[2], cols = y.shape[3];
  return conv.transposed ? grad_input_plan(conv.kernel_h, conv.kernel_w, conv.window, rows, cols)
                         : forward_plan(conv.kernel_h, conv.kernel_w, conv.window, rows, cols);
}

// T is the type of the maps in memory, W that of the weights, Conv what runs a row.
template <typename Conv, typename T, typename W>
void run(const TensorView& x, const Line& line, const TensorView* residual, const Pooling* pooling,
         const TensorView& y, const SamplerConv2d& conv) {
  using A = Accumulator<W>;
  CallMemory<W> memory(line, nullptr, false);
  SamplerCall<T> call{};
  call.maps.x = image_of<const T>(x);
  call.maps.y = image_of<T>(y);
  if (residual != nullptr) call.maps.residual = image_of<const T>(*residual);
  call.maps.first = memory.kernel(line, conv.activation, nullptr);
  call.plan = &plan_of(y, conv);
  std::vector<A> vectors;
  if (pooling != nullptr) {
    const Index channels = x.shape[1];
    for (const TensorView* t : {pooling->scale, pooling->shift}) {
      for (Index i = 0; i < channels; ++i) vectors.push_back(number_at<A>(*t, i));
    }
    call.pool = {vectors.data(), vectors.data() + channels, conv.activation};
  }
  run_sampler<Conv>(call, conv.threads);
}

void sampler_conv2d_forward(const TensorView& x, const Line& line, const TensorView* residual,
                            const Pooling* pooling, const TensorView& y,
                            const SamplerConv2d& conv) {
  for_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (x.shape[1] >= kFewChannels) {
        return run<DotLineConv, std::uint16_t, T>(x, line, residual, pooling, y, conv);
      }
    }
#endif
    run<LineConv<Accumulator<T>>, T, T>(x, line, residual, pooling, y, conv);
  });
}

}  // namespace

extern const SamplerConv2dKernels sampler_conv2d_kernels{&sampler_conv2d_forward};

}  // namespace pyeff::cpu::PYEFF_ISA
