// Chooses the object file of the instruction set in use. Compiled once; nested_conv2d.cpp and
// nested_conv2d_grad_weight.cpp are compiled once per instruction set.

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/nested_conv2d_kernels.h"
#include "cpu/packed_layout.h"

namespace pyeff::cpu {
namespace {

// isa() names nothing that was not compiled in.
const NestedConv2dKernels& kernels() {
  switch (isa()) {
#ifdef PYEFF_HAVE_AMX
    case Isa::kAmx:
      return amx::nested_conv2d_kernels;
#endif
#ifdef PYEFF_HAVE_AVX512
    case Isa::kAvx512:
      return avx512::nested_conv2d_kernels;
#endif
#ifdef PYEFF_HAVE_AVX2
    case Isa::kAvx2:
      return avx2::nested_conv2d_kernels;
#endif
    default:
      return generic::nested_conv2d_kernels;
  }
}

}  // namespace

std::int64_t nested_conv2d_packed_elements(const TensorView& weight, std::int64_t groups) {
  const auto& shape = weight.shape;
  const std::int64_t taps = shape[2] * shape[3];
  if (is_depthwise(weight, groups)) return taps * depthwise_row(groups);
  const std::int64_t panels = (shape[0] / groups + kPanel - 1) / kPanel;
  return groups * panels * taps * shape[1] * kPanel;
}

void nested_conv2d_pack(const TensorView& weight, const TensorView& packed, std::int64_t groups,
                        int threads) {
  kernels().pack(weight, packed, groups, threads);
}

void nested_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* packed,
                           const TensorView* bias, const TensorView& y, const NestedConv2d& conv) {
  ask_for_huge_pages(y);
  kernels().forward(x, weight, packed, bias, y, conv);
}

void nested_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& grad_x, const NestedConv2d& conv) {
  kernels().grad_input(grad_y, weight, grad_x, conv);
}

void nested_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& grad_weight, const NestedConv2d& conv) {
  kernels().grad_weight(grad_y, x, grad_weight, conv);
}

}  // namespace pyeff::cpu
