#pragma once
// The functions of pyeff/factorized_conv2d.h as every instruction set provides them.

#include "pyeff/factorized_conv2d.h"

namespace pyeff::cpu {

struct FactorizedConv2dKernels {
  decltype(&factorized_conv2d_pack) pack;
  decltype(&factorized_conv2d_forward) forward;
  decltype(&factorized_conv2d_grad_input) grad_input;
  decltype(&factorized_conv2d_grad_weight) grad_weight;
};

namespace generic {
extern const FactorizedConv2dKernels factorized_conv2d_kernels;
}
namespace avx2 {
extern const FactorizedConv2dKernels factorized_conv2d_kernels;
}
namespace avx512 {
extern const FactorizedConv2dKernels factorized_conv2d_kernels;
}
// Like avx512, with dot products of bfloat16.
namespace avx512bf16 {
extern const FactorizedConv2dKernels factorized_conv2d_kernels;
}
namespace amx {
extern const FactorizedConv2dKernels factorized_conv2d_kernels;
}

}  // namespace pyeff::cpu
