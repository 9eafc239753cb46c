#pragma once
// The steps of a branch stage that are no convolutions, by all threads of a block. A thread writes
// single elements; neighbours write neighbouring channels.

#include <cmath>

#include "cuda/activation.cuh"
#include "cuda/branch_stage_layout.h"
#include "cuda/common.cuh"

namespace pyeff::cuda {

__device__ inline int pixel_at(const StageSlot& slot, int r, int c) {
  return slot.base + r * slot.row + c * slot.pixel;
}

// Calls body(r, c, l) once for every element of `channels` channels of the slot's pixels.
template <typename Body>
__device__ void for_elements(const StageSlot& slot, int channels, const Body& body) {
  const int count = slot.rows * slot.cols * channels;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int pixel = i / channels;
    body(pixel / slot.cols, pixel % slot.cols, i - pixel * channels);
  }
}

// Zeros around the slot's map, and behind the channels of its pixels: nothing that a step writes.
template <typename T>
__device__ void write_zeros(const StageSlot& slot, T* maps) {
  T* const first = maps + slot.base - slot.top * slot.row - slot.left * slot.pixel;
  const int count = slot.all_rows * slot.all_cols * slot.pixel;
  const T zero = static_cast<T>(0.0f);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int pixel = i / slot.pixel, l = i - pixel * slot.pixel;
    const int r = pixel / slot.all_cols - slot.top, c = pixel % slot.all_cols - slot.left;
    const bool inside = r >= 0 && r < slot.rows && c >= 0 && c < slot.cols;
    if (!inside || l >= slot.channels) first[i] = zero;
  }
}

template <typename T>
__device__ void copy_channels(const StageTask& task, const StageSlot& x, const StageSlot& y,
                              T* maps) {
  using A = acc_t<T>;
  for_elements(y, x.channels, [&](int r, int c, int l) {
    const A v = static_cast<A>(maps[pixel_at(x, r, c) + l]);
    maps[pixel_at(y, r, c) + task.first_channel + l] =
        static_cast<T>(activated(v, task.activation));
  });
}

template <typename T>
__device__ void scale_shift(const StageTask& task, const StageSlot& x, const StageSlot& y, T* maps,
                            const acc_t<T>* scale) {
  using A = acc_t<T>;
  const A* shift = scale + (x.channels + kMatrixLanes - 1) / kMatrixLanes * kMatrixLanes;
  for_elements(y, y.channels, [&](int r, int c, int l) {
    const A v = static_cast<A>(maps[pixel_at(x, r, c) + l]) * scale[l] + shift[l];
    maps[pixel_at(y, r, c) + l] = static_cast<T>(activated(v, task.activation));
  });
}

template <typename T>
__device__ void add(const StageTask& task, const StageSlot& x, const StageSlot& other,
                    const StageSlot& y, T* maps) {
  using A = acc_t<T>;
  for_elements(y, y.channels, [&](int r, int c, int l) {
    const A v = static_cast<A>(maps[pixel_at(x, r, c) + l]) +
                static_cast<A>(maps[pixel_at(other, r, c) + l]);
    maps[pixel_at(y, r, c) + l] = static_cast<T>(activated(v, task.activation));
  });
}

// [C, H, W] in this order as one pixel.
template <typename T>
__device__ void flatten(const StageTask& task, const StageSlot& x, const StageSlot& y, T* maps) {
  using A = acc_t<T>;
  for_elements(x, x.channels, [&](int r, int c, int l) {
    const A v = static_cast<A>(maps[pixel_at(x, r, c) + l]);
    maps[y.base + (l * x.rows + r) * x.cols + c] = static_cast<T>(activated(v, task.activation));
  });
}

// Rows or columns [begin, end) of the source, every `step`-th; `size` counts the padding too.
struct StageWindow {
  std::int64_t begin, end, step, size;
};

__device__ inline StageWindow window_of(std::int64_t position, std::int64_t stride,
                                        std::int64_t kernel, std::int64_t dilation,
                                        std::int64_t before, std::int64_t after,
                                        std::int64_t size) {
  const std::int64_t begin = position * stride - before, end = begin + (kernel - 1) * dilation + 1;
  const std::int64_t inside = (end < size + after ? end : size + after) - begin;
  const std::int64_t skipped = begin < 0 ? (dilation - 1 - begin) / dilation * dilation : 0;
  return {begin + skipped, end < size ? end : size, dilation, inside};
}

__device__ inline StageWindow bin_of(int position, int bins, int size) {
  const int begin = position * size / bins, end = ((position + 1) * size + bins - 1) / bins;
  return {begin, end, 1, end - begin};
}

template <typename T>
__device__ acc_t<T> pooled(const StageTask& task, const StageSlot& x, const T* maps,
                           const StageWindow& rows, const StageWindow& cols, int l) {
  using A = acc_t<T>;
  A best = -A(INFINITY), sum = 0;
  for (std::int64_t r = rows.begin; r < rows.end; r += rows.step) {
    for (std::int64_t c = cols.begin; c < cols.end; c += cols.step) {
      const A v = static_cast<A>(maps[pixel_at(x, static_cast<int>(r), static_cast<int>(c)) + l]);
      best = v > best || v != v ? v : best;
      sum += v;
    }
  }
  if (!task.average) return best;
  const std::int64_t inside_r = rows.end - rows.begin, inside_c = cols.end - cols.begin;
  if (inside_r <= 0 || inside_c <= 0) return A(0);
  const bool padded = task.count_include_pad || task.adaptive;
  return sum / static_cast<A>(padded ? rows.size * cols.size : inside_r * inside_c);
}

template <typename T>
__device__ void pool(const StageTask& task, const StageSlot& x, const StageSlot& y, T* maps) {
  for_elements(y, y.channels, [&](int r, int c, int l) {
    const StageWindow rows = task.adaptive
                                 ? bin_of(r, y.rows, x.rows)
                                 : window_of(r, task.stride_h, task.kernel_h, task.dilation_h,
                                             task.top, task.bottom, x.rows);
    const StageWindow cols = task.adaptive
                                 ? bin_of(c, y.cols, x.cols)
                                 : window_of(c, task.stride_w, task.kernel_w, task.dilation_w,
                                             task.left, task.right, x.cols);
    maps[pixel_at(y, r, c) + l] =
        static_cast<T>(activated(pooled(task, x, maps, rows, cols, l), task.activation));
  });
}

}  // namespace pyeff::cuda
