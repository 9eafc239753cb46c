#pragma once
// Images with the channels side by side, where a kernel lies over them, and the padded band: a copy
// of some rows in the accumulator's type, with the zeros that the kernel reads around them.

#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/vec.h"
#include "pyeff/tensor_view.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// [n, rows, cols, channels], channel stride 1, the other strides in elements.
template <typename T>
struct Image {
  T* data;
  Index n, rows, cols, channels;
  Index n_stride, row_stride, col_stride;
};

template <typename T>
Image<T> image_of(const TensorView& t) {
  return {static_cast<T*>(t.data),
          t.shape[0],
          t.shape[2],
          t.shape[3],
          t.shape[1],
          t.stride[0],
          t.stride[2],
          t.stride[3]};
}

// One kernel position: the source pixel at (cell row * step + dy, cell col * step + dx) times the
// weights of `weight_tap`.
struct Offset {
  Index dy, dx, weight_tap;
};

// Cells (r, c) write the pixels (first_row + r * dest_step_h, first_col + c * dest_step_w).
struct Phase {
  Index first_row, first_col;
  Index rows, cols;
  Index offsets_begin, offsets_end;
};

// A convolution as one or more phases over a grid of cells. The forward pass is one phase; the
// input gradient of a strided convolution has one for every residue of the output position.
struct Plan {
  Index step_h, step_w, dest_step_h, dest_step_w;
  Index rows, cols;  // of the largest phase
  Index dy_min, dy_max, dx_min, dx_max;
  std::vector<Phase> phases;
  std::vector<Offset> offsets;

  void finish() {
    rows = cols = 0;
    for (const Phase& phase : phases) {
      rows = larger(rows, phase.rows);
      cols = larger(cols, phase.cols);
    }
    dy_min = dy_max = dx_min = dx_max = 0;
    if (!offsets.empty()) {
      dy_min = dy_max = offsets[0].dy;
      dx_min = dx_max = offsets[0].dx;
    }
    for (const Offset& o : offsets) {
      dy_min = smaller(dy_min, o.dy);
      dy_max = larger(dy_max, o.dy);
      dx_min = smaller(dx_min, o.dx);
      dx_max = larger(dx_max, o.dx);
    }
  }

  Index band_rows(Index cell_rows) const { return (cell_rows - 1) * step_h + dy_max - dy_min + 1; }
  Index band_cols() const { return (cols - 1) * step_w + dx_max - dx_min + 1; }
};

// Source pixels of some cell rows: data points at the pixel that cell (first, 0) reads at
// (dy_min, dx_min).
template <typename A>
struct Band {
  const A* data;
  Index row_stride, col_stride;
};

// Fetches the pixels of some rows a few at a time, spread over the work that goes on meanwhile. One
// line of a pixel is enough: the hardware fetches the lines that follow it.
template <typename T>
class Prefetch {
 public:
  void start(const Image<const T>& image, Index n, Index row, Index rows, Index steps) {
    at_ = image.data + n * image.n_stride + row * image.row_stride;
    rows_ = rows;
    cols_ = image.cols;
    col_ = 0;
    row_stride_ = image.row_stride;
    col_stride_ = image.col_stride;
    per_step_ = ceil_div(rows * cols_, larger(steps, 1));
  }
  void stop() { rows_ = 0; }

  void step() {
    for (Index i = 0; i < per_step_ && rows_ > 0; ++i) {
      prefetch(at_ + col_ * col_stride_);
      if (++col_ == cols_) {
        col_ = 0;
        at_ += row_stride_;
        --rows_;
      }
    }
  }

 private:
  const T* at_ = nullptr;
  Index rows_ = 0, cols_ = 0, col_ = 0;
  Index row_stride_ = 0, col_stride_ = 0, per_step_ = 0;
};

template <typename T, typename A>
inline void widen_row(const T* from, A* to, Index count) {
  for (Index i = 0; i < count; ++i) to[i] = widen(from[i]);
}
template <typename A>
inline void widen_row(const A* from, A* to, Index count) {
  std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(A));
}

// Pixels a multiple of half a page apart fall into the same few sets of the first-level cache.
template <typename A>
inline bool collides(Index pixel_stride) {
  constexpr Index kHalfPage = 2048;
  return pixel_stride * static_cast<Index>(sizeof(A)) % kHalfPage == 0;
}
template <typename A>
inline Index band_pixel(Index channels, Index step_w) {
  constexpr Index kApart = 64 / static_cast<Index>(sizeof(A));
  return collides<A>(channels * step_w) ? channels + kApart : channels;
}

template <typename T, typename A>
inline void widen_pixels(const T* from, Index from_stride, A* to, Index to_stride, Index count,
                         Index channels) {
  if constexpr (std::is_same_v<T, A>) {
    if (channels == kLanes<A>) {  // a call of memcpy would cost as much as the copy
      for (Index c = 0; c < count; ++c) store(to + c * to_stride, load(from + c * from_stride));
      return;
    }
  }
  for (Index c = 0; c < count; ++c) widen_row(from + c * from_stride, to + c * to_stride, channels);
}

// Copies `channels` channels from `channel` on of image n, rows [row, row + rows) and columns
// [col, col + cols), to [rows, cols, pixel]; what lies outside of the image is zero.
template <typename T, typename A>
void copy_band(const Image<const T>& image, Index n, Index row, Index rows, Index col, Index cols,
               Index channel, Index channels, Index pixel, A* to) {
  if (channels == 0) return;  // nothing will be read, and the image may have no memory
  const Index first = smaller(larger(-col, 0), cols);
  const Index last = larger(smaller(image.cols - col, cols), first);
  const bool dense = image.col_stride == channels && pixel == channels;
  for (Index r = row; r < row + rows; ++r, to += cols * pixel) {
    if (r < 0 || r >= image.rows || first == last) {
      std::memset(to, 0, static_cast<std::size_t>(cols * pixel) * sizeof(A));
      continue;
    }
    std::memset(to, 0, static_cast<std::size_t>(first * pixel) * sizeof(A));
    const T* from = image.data + n * image.n_stride + r * image.row_stride +
                    (col + first) * image.col_stride + channel;
    if (dense) {
      widen_row(from, to + first * pixel, (last - first) * channels);
    } else {
      widen_pixels(from, image.col_stride, to + first * pixel, pixel, last - first, channels);
    }
    std::memset(to + last * pixel, 0, static_cast<std::size_t>((cols - last) * pixel) * sizeof(A));
  }
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
