#pragma once
// Sums over the lanes of a warp.

#include "cuda/common.cuh"

namespace pyeff::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// For every lane, in the same order on every run. The whole warp comes here.
template <typename A>
__device__ A sum_of_warp(A mine) {
  for (int step = kWarp / 2; step > 0; step /= 2) mine += __shfl_xor_sync(kAllLanes, mine, step);
  return mine;
}

}  // namespace pyeff::cuda
