#pragma once
// The product that a nested convolution comes down to: a block sums
//   c [kRows, kCols] = sum over k of a [kRows, k] b [k, kCols]
// from tiles of kDepth terms that a loader brings into shared memory, kStages - 1 of them ahead.

#include <cstdint>
#include <type_traits>

#include "cuda/common.cuh"
#include "cuda/warp.cuh"

namespace pyeff::cuda {

// How a tile lies in shared memory: by lines, each of them `width` numbers and a pitch that keeps
// what a warp reads at a time in different banks.
constexpr int padded(int width, int element_bytes, bool columns) {
  return width + (element_bytes == 4 && columns ? 32 : 16) / element_bytes;
}

// kTensor: by the tensor cores, float32 in tf32; else one multiply-add at a time. kTransA: a lies
// [kDepth, kRows] in shared memory, else [kRows, kDepth]; kTransB: b lies [kDepth, kCols], else
// [kCols, kDepth].
template <typename T, bool kTensor_, int kRows_, int kCols_, int kWarpRows, int kWarpCols,
          int kStages_, bool kTransA, bool kTransB>
struct Tile {
  static_assert(!kTensor_ || !std::is_same_v<T, double>);
  using Value = T;
  using Acc = acc_t<T>;
  static constexpr bool kTensor = kTensor_;
  static constexpr int kRows = kRows_, kCols = kCols_, kStages = kStages_;
  static constexpr int kDepth = sizeof(T) == 2 ? 32 : 16;
  static constexpr int kThreads = 32 * kWarpRows * kWarpCols;
  static constexpr int kVector = 16 / sizeof(T);  // numbers of one copy
  static constexpr int kLinesA = kTransA ? kDepth : kRows, kWidthA = kTransA ? kRows : kDepth;
  static constexpr int kLinesB = kTransB ? kDepth : kCols, kWidthB = kTransB ? kCols : kDepth;
  static constexpr int kPitchA = padded(kWidthA, sizeof(T), kTransA);
  static constexpr int kPitchB = padded(kWidthB, sizeof(T), kTransB);
  static constexpr int kStage = kLinesA * kPitchA + kLinesB * kPitchB;
  static constexpr std::size_t kSharedBytes = std::size_t{kStages} * kStage * sizeof(T);

  // Of a warp, in products of 16 x 8; of a thread without tensor cores, in numbers.
  static constexpr int kPerWarpRows = kRows / kWarpRows, kPerWarpCols = kCols / kWarpCols;
  static constexpr int kTilesM = kPerWarpRows / 16, kTilesN = kPerWarpCols / 8;
  static constexpr int kThreadCols = 16, kThreadRows = kThreads / kThreadCols;
  static constexpr int kOwnRows = kTensor ? 2 * kTilesM : kRows / kThreadRows;
  static constexpr int kOwnCols = kTensor ? 2 * kTilesN : kCols / kThreadCols;
  static_assert(kPerWarpRows % 16 == 0 && kPerWarpCols % 16 == 0);
  static_assert(kOwnRows >= 1 && kOwnCols >= 1);

  Acc sum[kOwnRows][kOwnCols];

  __device__ Tile() {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
      for (int j = 0; j < kOwnCols; ++j) sum[i][j] = 0;
    }
  }

  // Where the thread's sums belong within [kRows, kCols].
  __device__ static int row(int i) {
    if constexpr (!kTensor) return threadIdx.x / kThreadCols + i * kThreadRows;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return warp / kWarpCols * kPerWarpRows + i / 2 * 16 + i % 2 * 8 + lane / 4;
  }
  __device__ static int col(int j) {
    if constexpr (!kTensor) return threadIdx.x % kThreadCols + j * kThreadCols;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return warp % kWarpCols * kPerWarpCols + j / 2 * 8 + lane % 4 * 2 + j % 2;
  }

  // Adds the product of one stage.
  __device__ void multiply(const T* a, const T* b) {
    if constexpr (!kTensor) {
      multiply_plain(a, b);
    } else if constexpr (sizeof(T) == 2) {
      multiply_half(a, b);
    } else {
      multiply_tf32(a, b);
    }
  }

  // Sums `steps` stages: load(step, a, b) copies one, asynchronously or not, by all threads.
  template <typename Load>
  __device__ void run(int steps, const Load& load) {
    T* const stages = shared_memory<T>();
    const auto fetch = [&](int step) {
      if (step < steps) {
        T* const stage = stages + step % kStages * kStage;
        load(step, stage, stage + kLinesA * kPitchA);
      }
      cp_async_commit();  // an empty group keeps the count
    };
    for (int step = 0; step < kStages - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      fetch(step + kStages - 1);  // into the stage that all threads have left
      const T* const stage = stages + step % kStages * kStage;
      multiply(stage, stage + kLinesA * kPitchA);
    }
    cp_async_wait<0>();
  }

 private:
  __device__ static T at_a(const T* a, int row, int k) {
    return kTransA ? a[k * kPitchA + row] : a[row * kPitchA + k];
  }
  __device__ static T at_b(const T* b, int k, int col) {
    return kTransB ? b[k * kPitchB + col] : b[col * kPitchB + k];
  }

  __device__ void multiply_plain(const T* a, const T* b) {
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      T left[kOwnRows], right[kOwnCols];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) left[i] = at_a(a, row(i), k);
#pragma unroll
      for (int j = 0; j < kOwnCols; ++j) right[j] = at_b(b, k, col(j));
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
        for (int j = 0; j < kOwnCols; ++j) sum[i][j] += left[i] * right[j];
      }
    }
  }

  // One product of 16 x 8; sums of a tile are not side by side.
  template <typename Multiply>
  __device__ void accumulate(int m, int n, const Multiply& multiply) {
    float d[4] = {sum[2 * m][2 * n], sum[2 * m][2 * n + 1], sum[2 * m + 1][2 * n],
                  sum[2 * m + 1][2 * n + 1]};
    multiply(d);
    sum[2 * m][2 * n] = d[0];
    sum[2 * m][2 * n + 1] = d[1];
    sum[2 * m + 1][2 * n] = d[2];
    sum[2 * m + 1][2 * n + 1] = d[3];
  }

  __device__ void multiply_half(const T* a, const T* b) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = warp / kWarpCols * kPerWarpRows;
    const int first_col = warp % kWarpCols * kPerWarpCols;
    const int eighth = lane / 8 % 2 * 8, half = lane / 16 * 8, line = lane % 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      std::uint32_t left[kTilesM][4], right[kTilesN][2];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        const int row = first_row + 16 * m;
        if constexpr (kTransA) {
          ldmatrix_x4_trans(left[m], a + (k + half + line) * kPitchA + row + eighth);
        } else {
          ldmatrix_x4(left[m], a + (row + eighth + line) * kPitchA + k + half);
        }
      }
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        const int col = first_col + 8 * n;
        std::uint32_t two[4];
        if constexpr (kTransB) {
          ldmatrix_x4_trans(two, b + (k + eighth + line) * kPitchB + col + half);
        } else {
          ldmatrix_x4(two, b + (col + half + line) * kPitchB + k + eighth);
        }
        right[n][0] = two[0];
        right[n][1] = two[1];
        right[n + 1][0] = two[2];
        right[n + 1][1] = two[3];
      }
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          accumulate(m, n, [&](float (&d)[4]) { mma(d, left[m], right[n], T{}); });
        }
      }
    }
  }

  __device__ void multiply_tf32(const T* a, const T* b) {
    const int warp = threadIdx.x / 32, q = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int first_row = warp / kWarpCols * kPerWarpRows + q;
    const int first_col = warp % kWarpCols * kPerWarpCols + q;
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      std::uint32_t left[kTilesM][4], right[kTilesN][2];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          left[m][i] = to_tf32(at_a(a, first_row + 16 * m + i % 2 * 8, k + t + i / 2 * 4));
        }
      }
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          right[n][i] = to_tf32(at_b(b, k + t + 4 * i, first_col + 8 * n));
      }
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          accumulate(m, n, [&](float (&d)[4]) { mma_tf32(d, left[m], right[n]); });
        }
      }
    }
  }
};

// The tiles that a kernel is compiled with, of which a launch takes one. Plain arithmetic has one.
template <typename T, bool kTensor, bool kLarge, bool kTransA, bool kTransB>
struct TileOf {
  using type =
      Tile<T, true, kLarge ? 128 : 64, kLarge ? 128 : 64, 2, kLarge ? 4 : 2, 3, kTransA, kTransB>;
};
template <typename T, bool kLarge, bool kTransA, bool kTransB>
struct TileOf<T, false, kLarge, kTransA, kTransB> {
  using type = Tile<T, false, 64, 64, 2, 4, 3, kTransA, kTransB>;
};

// Fills lines of `width` numbers, the threads of a block side by side along a line. source(line,
// at) is the address of a number, or null for zero; `count` of a line exist. With `vector` a copy's
// numbers lie side by side at a multiple of 16 bytes, and all or none of them exist.
template <int kThreads, int kLines, int kWidth, int kPitch, typename T, typename Source>
__device__ __forceinline__ void fill_lines(T* tile, int count, bool vector, const T* anywhere,
                                           const Source& source) {
  constexpr int kVector = 16 / sizeof(T), kPerLine = kWidth / kVector;
  static_assert(kLines * kPerLine % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kLines * kPerLine / kThreads; ++i) {
    const int slot = i * kThreads + threadIdx.x, line = slot / kPerLine;
    const int at = slot % kPerLine * kVector;
    T* const to = tile + line * kPitch + at;
    const auto from = source(line);
    if (vector) {
      const T* const address = at < count ? from(at) : nullptr;
      cp_async_16(to, address == nullptr ? anywhere : address, address != nullptr);
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < kVector; ++e) {
      const T* const address = at + e < count ? from(at + e) : nullptr;
      to[e] = address == nullptr ? static_cast<T>(0.0f) : *address;
    }
  }
}

}  // namespace pyeff::cuda
