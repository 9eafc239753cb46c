// Chooses the object file of the instruction set in use. Compiled once; branch_conv2d.cpp,
// branch_conv2d_grad_weight.cpp and combine.cpp are compiled once per instruction set.

#include "cpu/branch_conv2d_kernels.h"
#include "cpu/branch_conv2d_layout.h"
#include "cpu/isa.h"

namespace pyeff::cpu {
namespace {

// isa() names nothing that was not compiled in.
const BranchKernels& kernels() {
  switch (isa()) {
#ifdef PYEFF_HAVE_AMX
    case Isa::kAmx:
      return amx::branch_kernels;
#endif
#ifdef PYEFF_HAVE_AVX512
    case Isa::kAvx512:
      return avx512::branch_kernels;
#endif
#ifdef PYEFF_HAVE_AVX2
    case Isa::kAvx2:
      return avx2::branch_kernels;
#endif
    default:
      return generic::branch_kernels;
  }
}

}  // namespace

std::int64_t branch_conv2d_packed_elements(const TensorView& weight, std::int64_t groups) {
  return weight.shape[0] * forward_layout(weight, groups).elements();
}

void branch_conv2d_pack(const TensorView& weight, const TensorView& packed, std::int64_t groups,
                        int threads) {
  kernels().pack(weight, packed, groups, threads);
}

void branch_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* packed,
                           const TensorView* bias, const TensorView& index, const TensorView& y,
                           const BranchConv2d& conv) {
  kernels().forward(x, weight, packed, bias, index, y, conv);
}

void branch_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& index, const TensorView& grad_x,
                              const BranchConv2d& conv) {
  kernels().grad_input(grad_y, weight, index, grad_x, conv);
}

void branch_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& index, const TensorView& grad_weight,
                               const TensorView* grad_bias, const BranchConv2d& conv) {
  kernels().grad_weight(grad_y, x, index, grad_weight, grad_bias, conv);
}

void combine_forward(const TensorView& y, const TensorView& projection, const TensorView* packed,
                     const TensorView* bias, const TensorView& index,
                     const TensorView& route_weight, const TensorView& out, int threads) {
  kernels().combine(y, projection, packed, bias, index, route_weight, out, threads);
}

void combine_grad_input(const TensorView& grad_out, const TensorView& y,
                        const TensorView& projection, const TensorView& index,
                        const TensorView& route_weight, const TensorView* grad_y,
                        const TensorView* grad_route_weight, int threads) {
  kernels().grad_combined(grad_out, y, projection, index, route_weight, grad_y, grad_route_weight,
                          threads);
}

void combine_grad_projection(const TensorView& grad_out, const TensorView& y,
                             const TensorView& index, const TensorView& route_weight,
                             const TensorView& grad_projection, int threads) {
  kernels().grad_projection(grad_out, y, index, route_weight, grad_projection, threads);
}

}  // namespace pyeff::cpu
