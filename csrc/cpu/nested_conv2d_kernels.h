#pragma once
// The functions of pyeff/nested_conv2d.h as every instruction set provides them.

#include "pyeff/nested_conv2d.h"

namespace pyeff::cpu {

struct NestedConv2dKernels {
  decltype(&nested_conv2d_pack) pack;
  decltype(&nested_conv2d_forward) forward;
  decltype(&nested_conv2d_grad_input) grad_input;
  decltype(&nested_conv2d_grad_weight) grad_weight;
};

namespace generic {
extern const NestedConv2dKernels nested_conv2d_kernels;
}
namespace avx2 {
extern const NestedConv2dKernels nested_conv2d_kernels;
}
namespace avx512 {
extern const NestedConv2dKernels nested_conv2d_kernels;
}
namespace amx {
extern const NestedConv2dKernels nested_conv2d_kernels;
}

}  // namespace pyeff::cpu
