#pragma once
// The convolutions of a branch stage; a linear step is one of 1 x 1 on one pixel. Sources have
// zeros around them as far as the kernel reaches, so no tap asks where it is.

#include <cstdint>

#include "cuda/branch_stage_point.cuh"
#include "cuda/warp.cuh"

namespace pyeff::cuda {

// What a convolution writes: activation(sum + residual), in the dtype of the maps.
template <typename T>
struct StageResult {
  const StageTask& task;
  const StageSlot& y;
  const StageSlot* residual;  // or null
  T* maps;

  __device__ void write(int pixel, int channel, acc_t<T> sum) const {
    const int r = pixel / y.cols, c = pixel - r * y.cols;
    if (residual != nullptr) {
      sum += static_cast<acc_t<T>>(maps[pixel_at(*residual, r, c) + channel]);
    }
    maps[pixel_at(y, r, c) + channel] = static_cast<T>(activated(sum, task.activation));
  }
};

// Where the kernel's first tap reads for a pixel of the result; pixels past the last repeat it.
__device__ inline int first_tap(const StageTask& task, const StageSlot& x, const StageSlot& y,
                                int pixel) {
  const int last = y.rows * y.cols - 1, p = pixel < last ? pixel : last;
  return pixel_at(x, p / y.cols * task.stride_h - task.top, p % y.cols * task.stride_w - task.left);
}

// --- tensor cores --------------------------------------------------------------------------------

struct alignas(8) StageFragment {
  std::uint32_t r[2];
};

// sum[p, o] = bias[o] + sum over taps and channels, for 16 pixels and 8 kTiles outputs, by a warp.
// Weights lie in the order in which the lanes hold them and come from the cache, kAhead steps at a
// time so that their latencies overlap; pixels come from shared memory.
template <typename T, int kTiles>
__device__ void matrix_tile(const StageResult<T>& result, const StageSlot& x, const T* weights,
                            const float* bias, int pixel_tile, int out_tile) {
  constexpr int kAhead = 4;
  const StageTask& task = result.task;
  const StageSlot& y = result.y;
  const int lane = threadIdx.x % 32;
  const int chunks = (x.channels + kMatrixDepth - 1) / kMatrixDepth;
  const int steps = task.kernel_h * task.kernel_w * chunks;
  const int last_tile = (y.channels + kMatrixLanes - 1) / kMatrixLanes - 1;
  const StageFragment* from[kTiles];
  float sum[kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int tile = out_tile + j < last_tile ? out_tile + j : last_tile;
    from[j] =
        reinterpret_cast<const StageFragment*>(weights) + std::int64_t{tile} * steps * 32 + lane;
    const float* b = bias + tile * kMatrixLanes + lane % 4 * 2;
    sum[j][0] = sum[j][2] = b[0];
    sum[j][1] = sum[j][3] = b[1];
  }
  const T* const row =
      result.maps + first_tap(task, x, y, pixel_tile * 16 + lane % 16) + lane / 16 * 8;

  int chunk = 0, u = 0, v = 0, offset = 0;
  for (int step = 0; step < steps; step += kAhead) {
    StageFragment b[kAhead][kTiles];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (step + i < steps) b[i][j] = from[j][(step + i) * 32];
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (step + i == steps) break;
      std::uint32_t a[4];
      ldmatrix_x4(a, row + offset);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) mma(sum[j], a, b[i][j].r, T{});
      offset += kMatrixDepth;
      if (++chunk == chunks) {
        chunk = 0;
        if (++v == task.kernel_w) {
          v = 0;
          ++u;
        }
        offset = u * task.dilation_h * x.row + v * task.dilation_w * x.pixel;
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pixel = pixel_tile * 16 + lane / 4 + i / 2 * 8;
      const int channel = (out_tile + j) * kMatrixLanes + lane % 4 * 2 + i % 2;
      if (pixel < y.rows * y.cols && channel < y.channels) {
        result.write(pixel, channel, sum[j][i]);
      }
    }
  }
}

template <typename T, int kTiles>
__device__ void matrix_conv(const StageResult<T>& result, const StageSlot& x, const T* weights,
                            const float* bias) {
  const int out_tiles = (result.y.channels + kMatrixLanes * kTiles - 1) / (kMatrixLanes * kTiles);
  const int tiles = (result.y.rows * result.y.cols + 15) / 16 * out_tiles;
  for (int t = threadIdx.x / 32; t < tiles; t += blockDim.x / 32) {
    matrix_tile<T, kTiles>(result, x, weights, bias, t / out_tiles, t % out_tiles * kTiles);
  }
}

// --- one multiply-add at a time ------------------------------------------------------------------

// Of a thread; doubles take two registers each.
template <typename T>
constexpr int kDirectPixels = sizeof(T) == 8 ? 2 : 4;

// The same sum for kDirectPixels pixels and kOuts outputs from `out` on, by a thread. The outputs
// are of one group.
template <typename T, int kOuts>
__device__ void direct_tile(const StageResult<T>& result, const StageSlot& x, const T* weights,
                            const acc_t<T>* bias, int first_pixel, int out) {
  using A = acc_t<T>;
  const StageTask& task = result.task;
  const StageSlot& y = result.y;
  const int lanes = (y.channels + kDirectLanes - 1) / kDirectLanes * kDirectLanes;
  const int first_channel = out / (y.channels / task.groups) * task.rows_in;
  A sum[kDirectPixels<T>][kOuts];
  const T* from[kDirectPixels<T>];
#pragma unroll
  for (int p = 0; p < kDirectPixels<T>; ++p) {
    from[p] = result.maps + first_tap(task, x, y, first_pixel + p) + first_channel;
#pragma unroll
    for (int o = 0; o < kOuts; ++o) sum[p][o] = bias[out + o];
  }
  const T* w = weights + out;
  for (int u = 0; u < task.kernel_h; ++u) {
    for (int v = 0; v < task.kernel_w; ++v) {
      const int tap = u * task.dilation_h * x.row + v * task.dilation_w * x.pixel;
#pragma unroll 4
      for (int i = 0; i < task.rows_in; ++i, w += lanes) {
        A weight[kOuts];
#pragma unroll
        for (int o = 0; o < kOuts; ++o) weight[o] = static_cast<A>(w[o]);
#pragma unroll
        for (int p = 0; p < kDirectPixels<T>; ++p) {
          const A value = static_cast<A>(from[p][tap + i]);
#pragma unroll
          for (int o = 0; o < kOuts; ++o) sum[p][o] += value * weight[o];
        }
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kDirectPixels<T>; ++p) {
#pragma unroll
    for (int o = 0; o < kOuts; ++o) {
      if (first_pixel + p < y.rows * y.cols && out + o < y.channels) {
        result.write(first_pixel + p, out + o, sum[p][o]);
      }
    }
  }
}

// Neighbouring threads have neighbouring outputs of the same pixels.
template <typename T, int kOuts>
__device__ void direct_conv(const StageResult<T>& result, const StageSlot& x, const T* weights,
                            const acc_t<T>* bias) {
  const int out_tiles = (result.y.channels + kOuts - 1) / kOuts;
  const int pixels = result.y.rows * result.y.cols;
  const int tiles = (pixels + kDirectPixels<T> - 1) / kDirectPixels<T> * out_tiles;
  for (int t = threadIdx.x; t < tiles; t += blockDim.x) {
    direct_tile<T, kOuts>(result, x, weights, bias, t / out_tiles * kDirectPixels<T>,
                          t % out_tiles * kOuts);
  }
}

}  // namespace pyeff::cuda
