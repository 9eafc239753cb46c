#pragma once
// The functions of pyeff/branch_conv2d.h and pyeff/combine.h as every instruction set provides
// them.

#include "pyeff/branch_conv2d.h"
#include "pyeff/combine.h"

namespace pyeff::cpu {

struct BranchKernels {
  decltype(&branch_conv2d_pack) pack;
  decltype(&branch_conv2d_forward) forward;
  decltype(&branch_conv2d_grad_input) grad_input;
  decltype(&branch_conv2d_grad_weight) grad_weight;
  decltype(&combine_forward) combine;
  decltype(&combine_grad_input) grad_combined;
  decltype(&combine_grad_projection) grad_projection;
};

namespace generic {
extern const BranchKernels branch_kernels;
}
namespace avx2 {
extern const BranchKernels branch_kernels;
}
namespace avx512 {
extern const BranchKernels branch_kernels;
}
namespace amx {
extern const BranchKernels branch_kernels;
}

}  // namespace pyeff::cpu
