#pragma once
// What the kernels of branch_conv2d have in common: maps, and which pixels a tap reads.

#include <cstdint>

#include "cuda/common.cuh"
#include "cuda/load.cuh"
#include "cuda/tile.cuh"
#include "pyeff/branch_conv2d.h"

namespace pyeff::cuda {

// [N, k, rows, cols, channels] by its strides; `route` is 0 where the routes of an image share a
// map.
template <typename T>
struct BranchMaps {
  T* data;
  std::int64_t image, route, row, pixel;
  int rows, cols;
  bool wide;  // 16 bytes of a group's channels can be copied at once

  __host__ __device__ int pixels() const { return rows * cols; }
  __device__ T* map(std::int64_t n, std::int64_t j) const { return data + n * image + j * route; }
  __device__ T* at(T* map, int r, int c) const { return map + r * row + c * pixel; }
};

template <typename T>
BranchMaps<T> branch_maps(const TensorView& t, std::int64_t groups) {
  const bool shared = t.ndim == 4;
  const int channel = t.ndim - 3, row = t.ndim - 2, col = t.ndim - 1;
  const bool wide = aligned(t.as<T>(), t, channel) && fills_chunks<T>(t.shape[channel] / groups);
  // The stride of a dimension of one element may be anything.
  return {t.as<T>(),
          t.stride[0],
          shared ? 0 : t.stride[1],
          t.shape[row] == 1 ? 0 : t.stride[row],
          t.shape[col] == 1 ? 0 : t.stride[col],
          static_cast<int>(t.shape[row]),
          static_cast<int>(t.shape[col]),
          wide};
}

// Which pixel of the source a tap of the kernel reads for a pixel of the result.
struct BranchTaps {
  int kernel_h, kernel_w;
  std::int64_t stride_h, stride_w, top, left, dilation_h, dilation_w;
  bool inverse;  // from the pixels of x to those of y, for the gradient of x

  __host__ __device__ int count() const { return kernel_h * kernel_w; }

  // Returns whether there is one.
  __device__ bool find(int r, int c, int u, int v, int rows, int cols, int& from_r,
                       int& from_c) const {
    return side(r, u, stride_h, top, dilation_h, rows, from_r) &&
           side(c, v, stride_w, left, dilation_w, cols, from_c);
  }

 private:
  __device__ bool side(int position, int tap, std::int64_t stride, std::int64_t before,
                       std::int64_t dilation, int size, int& from) const {
    std::int64_t at =
        inverse ? position + before - tap * dilation : position * stride + tap * dilation - before;
    if (at < 0) return false;
    if (inverse) {
      if (at % stride != 0) return false;
      at /= stride;
    }
    from = static_cast<int>(at);
    return at < size;
  }
};

inline BranchTaps branch_taps(const TensorView& weight, const ConvWindow& w, bool inverse) {
  return {static_cast<int>(weight.shape[3]),
          static_cast<int>(weight.shape[4]),
          w.stride_h,
          w.stride_w,
          w.pad_top,
          w.pad_left,
          w.dilation_h,
          w.dilation_w,
          inverse};
}

// result[n, j, p, o] = bias[b, o] + sum over taps and c of source[n, j, find(p, tap), c]
// weight[b, o, tap, c] with b = index[n, j]. A result that routes share gets the sum over j. Routes
// to no branch give zeros.
template <typename T>
struct BranchProblem {
  BranchMaps<const T> source;
  BranchMaps<T> result;
  const T* weight;            // [B, groups, outputs, kh, kw, channels]
  const T* bias;              // [B, groups, outputs] or null
  const std::int32_t* index;  // [N, k]
  BranchTaps taps;
  std::int64_t images, branches;
  int k, groups, outputs, channels;  // of a group
  bool summed;                       // over the routes
  bool wide;                         // as the source's and the result's maps are; of the weight

  __device__ bool exists(std::int64_t branch) const { return branch >= 0 && branch < branches; }
  __host__ __device__ std::int64_t items() const { return summed ? images : images * k; }
};

}  // namespace pyeff::cuda
