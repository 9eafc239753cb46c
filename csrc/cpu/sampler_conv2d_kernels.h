#pragma once
// The functions of pyeff/sampler_conv2d.h as every instruction set provides them.

#include "pyeff/sampler_conv2d.h"

namespace pyeff::cpu {

struct SamplerConv2dKernels {
  decltype(&sampler_conv2d_forward) forward;
};

namespace generic {
extern const SamplerConv2dKernels sampler_conv2d_kernels;
}
namespace avx2 {
extern const SamplerConv2dKernels sampler_conv2d_kernels;
}
namespace avx512 {
extern const SamplerConv2dKernels sampler_conv2d_kernels;
}
// Like avx512, with dot products of bfloat16.
namespace avx512bf16 {
extern const SamplerConv2dKernels sampler_conv2d_kernels;
}
namespace amx {
extern const SamplerConv2dKernels sampler_conv2d_kernels;
}

}  // namespace pyeff::cpu
