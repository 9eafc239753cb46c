// Chooses the object file of the instruction set in use. Compiled once; sampler_conv2d.cpp is
// compiled once per instruction set.

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/sampler_conv2d_kernels.h"

namespace pyeff::cpu {
namespace {

// isa() names nothing that was not compiled in.
const SamplerConv2dKernels& kernels() {
  switch (isa()) {
#ifdef PYEFF_HAVE_AMX
    case Isa::kAmx:
      return amx::sampler_conv2d_kernels;
#endif
#ifdef PYEFF_HAVE_AVX512
    case Isa::kAvx512:
#ifdef PYEFF_HAVE_AVX512BF16
      if (has_avx512_bf16()) return avx512bf16::sampler_conv2d_kernels;
#endif
      return avx512::sampler_conv2d_kernels;
#endif
#ifdef PYEFF_HAVE_AVX2
    case Isa::kAvx2:
      return avx2::sampler_conv2d_kernels;
#endif
    default:
      return generic::sampler_conv2d_kernels;
  }
}

}  // namespace

void sampler_conv2d_forward(const TensorView& x, const Line& line, const TensorView* residual,
                            const Pooling* pooling, const TensorView& y,
                            const SamplerConv2d& conv) {
  ask_for_huge_pages(y);
  kernels().forward(x, line, residual, pooling, y, conv);
}

}  // namespace pyeff::cpu
