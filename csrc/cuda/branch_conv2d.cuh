#pragma once
// What the kernels of branch_conv2d have in common: maps, and which pixels a tap reads.

#include <cstdint>

#include "cuda/common.cuh"
#include "cuda/warp.cuh"
#include "pyeff/branch_conv2d.h"

namespace pyeff::cuda {

// [N, k, rows, cols, channels] by its strides; `route` is 0 where the routes of an image share a
// map.
template <typename T>
struct BranchMaps {
  T* data;
  std::int64_t image, route, row, pixel;
  int rows, cols;

  __host__ __device__ int pixels() const { return rows * cols; }
  __device__ T* map(std::int64_t n, std::int64_t j) const { return data + n * image + j * route; }
  __device__ T* at(T* map, int r, int c) const { return map + r * row + c * pixel; }
};

template <typename T>
BranchMaps<T> branch_maps(const TensorView& t) {
  const bool shared = t.ndim == 4;
  const int row = t.ndim - 2, col = t.ndim - 1;
  // The stride of a dimension of one element may be anything.
  return {t.as<T>(),
          t.stride[0],
          shared ? 0 : t.stride[1],
          t.shape[row] == 1 ? 0 : t.stride[row],
          t.shape[col] == 1 ? 0 : t.stride[col],
          static_cast<int>(t.shape[row]),
          static_cast<int>(t.shape[col])};
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

  __device__ bool exists(std::int64_t branch) const { return branch >= 0 && branch < branches; }
  __host__ __device__ std::int64_t items() const { return summed ? images : images * k; }
};

// Sixteen bytes, which one instruction moves.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int kElements = 16 / sizeof(T);
  T v[kElements];
};

template <typename T>
constexpr bool kOnTensorCores = sizeof(T) == 2;

// Copies such a piece of a row into shared memory, zeros where it is not valid or past the
// channels. kWhole: all of it is valid or nothing, and it comes by cp.async.
template <typename T, bool kWhole>
__device__ void copy_piece(T* to, const T* from, int channels, bool valid) {
  if constexpr (kWhole) {
    cp_async_16(to, from, valid && channels > 0);
  } else {
#pragma unroll
    for (int e = 0; e < Chunk<T>::kElements; ++e) {
      to[e] = valid && e < channels ? from[e] : static_cast<T>(0.0f);
    }
  }
}

// Whether every piece of the maps is whole and aligned.
template <typename T>
bool is_whole(const BranchMaps<const T>& maps, int channels) {
  const auto fits = [](std::int64_t stride) { return stride % Chunk<T>::kElements == 0; };
  return fits(channels) && fits(maps.image) && fits(maps.route) && fits(maps.row) &&
         fits(maps.pixel) && reinterpret_cast<std::uintptr_t>(maps.data) % 16 == 0;
}

}  // namespace pyeff::cuda
