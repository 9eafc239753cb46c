// Chooses the object file of the instruction set in use. Compiled once; factorized_conv2d.cpp and
// factorized_conv2d_grad_weight.cpp are compiled once per instruction set.

#include "cpu/factorized_conv2d_kernels.h"
#include "cpu/factorized_conv2d_layout.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"

namespace pyeff::cpu {
namespace {

// isa() names nothing that was not compiled in.
const FactorizedConv2dKernels& kernels() {
  switch (isa()) {
#ifdef PYEFF_HAVE_AMX
    case Isa::kAmx:
      return amx::factorized_conv2d_kernels;
#endif
#ifdef PYEFF_HAVE_AVX512
    case Isa::kAvx512:
#ifdef PYEFF_HAVE_AVX512BF16
      if (has_avx512_bf16()) return avx512bf16::factorized_conv2d_kernels;
#endif
      return avx512::factorized_conv2d_kernels;
#endif
#ifdef PYEFF_HAVE_AVX2
    case Isa::kAvx2:
      return avx2::factorized_conv2d_kernels;
#endif
    default:
      return generic::factorized_conv2d_kernels;
  }
}

}  // namespace

bool line_can_winograd(const TensorView& weight) {
  const bool known = weight.dtype == Dtype::kFloat32 || weight.dtype == Dtype::kBFloat16;
  return known && weight.shape[2] * weight.shape[3] == kWinogradTaps;
}

std::int64_t factorized_conv2d_packed_elements(const TensorView& weight, bool winograd) {
  return line_layout(weight, winograd).elements();
}

void factorized_conv2d_pack(const TensorView& weight, bool winograd, const TensorView& packed) {
  kernels().pack(weight, winograd, packed);
}

void factorized_conv2d_forward(const TensorView& x, const Line& first, const Line* second,
                               const Epilogue& epilogue, const TensorView& y,
                               const FactorizedConv2d& conv) {
  ask_for_huge_pages(y);
  kernels().forward(x, first, second, epilogue, y, conv);
}

void factorized_conv2d_grad_input(const TensorView& grad_y, const Line& line,
                                  const TensorView* before, const TensorView& grad_x,
                                  const FactorizedConv2d& conv) {
  kernels().grad_input(grad_y, line, before, grad_x, conv);
}

void factorized_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                                   const Line& grad_line, const TensorView* grad_bias,
                                   const FactorizedConv2d& conv) {
  kernels().grad_weight(grad_y, x, grad_line, grad_bias, conv);
}

}  // namespace pyeff::cpu
