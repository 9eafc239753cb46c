#pragma once
// A block's tile of sums for factorized_conv2d, by tensor cores or by fused multiply-adds, from
// panels in shared memory. Both kinds of tile have the same members:
//
//   multiply(a, b)          sums[row, col] += sum_k a[row][k] b[col][k]
//   multiply_columns(a, b)  sums[row, col] += sum_k a[k][row] b[k][col]
//   each(f)                 f(row, col, v) for every kRun adjacent sums v[kRun] of the thread
//
// A panel holds kDepth of k. The distance between its rows, in 16 bytes, is odd, so that eight rows
// lie in different banks.

#include <cstdint>

#include "cuda/common.cuh"
#include "cuda/warp.cuh"

namespace pyeff::cuda {

// kRun elements that one instruction moves.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Run {
  T v[kCount];
};

// A warp owns 32 rows by up to 32 columns. float is multiplied in TF32.
template <typename T, int kTileRows, int kTileCols, int kDepthBytes>
class TensorTile {
 public:
  using Value = T;
  static constexpr int kRows = kTileRows, kCols = kTileCols;
  static constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
  static constexpr int kPad = 16 / static_cast<int>(sizeof(T));
  static constexpr int kColumnPad = 8;          // of panels for multiply_columns
  static constexpr int kSumsPitch = kCols + 8;  // of sums in shared memory
  static constexpr int kRun = 2;
  static constexpr int kWarpCols = kCols < 32 ? kCols : 32;
  static constexpr int kWarpsAcross = kCols / kWarpCols;
  static constexpr int kThreads = kRows * kWarpsAcross;
  static_assert(kRows % 32 == 0 && kWarpCols % 16 == 0 && kDepthBytes % 32 == 0);

  __device__ void clear() {
#pragma unroll
    for (auto& block : sums_) {
#pragma unroll
      for (auto& fragment : block) {
#pragma unroll
        for (float& sum : fragment) sum = 0.0f;
      }
    }
  }

  __device__ void multiply(const T* a, int a_pitch, const T* b, int b_pitch) {
    const int lane = threadIdx.x % 32;
    // 8 x 8 blocks of 16 bits, or 8 x 4 of 32: ldmatrix moves rows of 16 bytes whatever they hold.
    const T* const a_row = a + (first_row() + lane % 16) * a_pitch + lane / 16 * kHalfStep;
    const T* const b_row =
        b + (first_col() + lane % 8 + lane / 16 * 8) * b_pitch + lane / 8 % 2 * kHalfStep;
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
      std::uint32_t a_part[2][4], b_part[kWarpCols / 16][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) ldmatrix_x4(a_part[i], a_row + i * 16 * a_pitch + k);
#pragma unroll
      for (int j = 0; j < kWarpCols / 16; ++j) ldmatrix_x4(b_part[j], b_row + j * 16 * b_pitch + k);
      if constexpr (sizeof(T) == 4) {
        round_parts(a_part);
        round_parts(b_part);
      }
      add_products(a_part, b_part);
    }
  }

  __device__ void multiply_columns(const T* a, int a_pitch, const T* b, int b_pitch) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
      std::uint32_t a_part[2][4], b_part[kWarpCols / 16][4];
      if constexpr (sizeof(T) == 2) {
        const T* const a_at =
            a + (k + lane % 8 + lane / 16 * 8) * a_pitch + first_row() + lane / 8 % 2 * 8;
        const T* const b_at = b + (k + lane % 16) * b_pitch + first_col() + lane / 16 * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) ldmatrix_x4_trans(a_part[i], a_at + i * 16);
#pragma unroll
        for (int j = 0; j < kWarpCols / 16; ++j) ldmatrix_x4_trans(b_part[j], b_at + j * 16);
      } else {  // nothing transposes 32 bits: every lane fetches its own
        const T* const a_at = a + (k + lane % 4) * a_pitch + first_row() + lane / 4;
        const T* const b_at = b + (k + lane % 4) * b_pitch + first_col() + lane / 4;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          a_part[i / 4][i % 4] = to_tf32(a_at[i % 4 / 2 * 4 * a_pitch + i / 4 * 16 + i % 2 * 8]);
        }
#pragma unroll
        for (int j = 0; j < kWarpCols / 4; ++j) {
          b_part[j / 4][j % 4] = to_tf32(b_at[j % 2 * 4 * b_pitch + j / 2 * 8]);
        }
      }
      add_products(a_part, b_part);
    }
  }

  template <typename F>
  __device__ void each(const F& f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // of 8 rows
      const int row = first_row() + i * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < kWarpCols / 8; ++j) {
        const float v[kRun] = {sums_[i / 2][j][i % 2 * 2], sums_[i / 2][j][i % 2 * 2 + 1]};
        f(row, first_col() + j * 8 + lane % 4 * 2, v);
      }
    }
  }

 private:
  static constexpr int kHalfStep = 16 / static_cast<int>(sizeof(T)), kStep = 2 * kHalfStep;

  static __device__ int first_row() {
    return static_cast<int>(threadIdx.x) / 32 / kWarpsAcross * 32;
  }
  static __device__ int first_col() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsAcross * kWarpCols;
  }

  // Products in TF32 would cut what ldmatrix moved; to the nearest is no further than half as far.
  template <int kParts>
  static __device__ void round_parts(std::uint32_t (&parts)[kParts][4]) {
#pragma unroll
    for (auto& part : parts) {
#pragma unroll
      for (std::uint32_t& bits : part) bits = to_tf32(__uint_as_float(bits));
    }
  }

  __device__ void add_products(const std::uint32_t (&a)[2][4],
                               const std::uint32_t (&b)[kWarpCols / 16][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpCols / 8; ++j) {
        const std::uint32_t b_pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        if constexpr (sizeof(T) == 4) {
          mma_tf32(sums_[i][j], a[i], b_pair);
        } else {
          mma(sums_[i][j], a[i], b_pair, T{});
        }
      }
    }
  }

  float sums_[2][kWarpCols / 8][4];
};

// float and double in full precision. 256 threads of 4 x 4 sums, 16 rows and columns apart.
template <typename T>
class SimtTile {
 public:
  using Value = T;
  static constexpr int kRows = 64, kCols = 64;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kPad = 16 / static_cast<int>(sizeof(T));
  static constexpr int kColumnPad = kPad, kSumsPitch = kCols + kPad;
  static constexpr int kRun = 1;
  static constexpr int kThreads = 256;

  __device__ void clear() {
#pragma unroll
    for (auto& row : sums_) {
#pragma unroll
      for (T& sum : row) sum = T(0);
    }
  }

  __device__ void multiply(const T* a, int a_pitch, const T* b, int b_pitch) {
    using Chunk = Run<T, kPad>;
#pragma unroll
    for (int k = 0; k < kDepth; k += kPad) {
      Chunk a_part[4], b_part[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a_part[i] = *reinterpret_cast<const Chunk*>(a + (row() + 16 * i) * a_pitch + k);
        b_part[i] = *reinterpret_cast<const Chunk*>(b + (col() + 16 * i) * b_pitch + k);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) {
#pragma unroll
        for (int l = 0; l < kPad; ++l)
          sums_[i / 4][i % 4] += a_part[i / 4].v[l] * b_part[i % 4].v[l];
      }
    }
  }

  __device__ void multiply_columns(const T* a, int a_pitch, const T* b, int b_pitch) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      T a_part[4], b_part[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a_part[i] = a[k * a_pitch + row() + 16 * i];
        b_part[i] = b[k * b_pitch + col() + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) sums_[i / 4][i % 4] += a_part[i / 4] * b_part[i % 4];
    }
  }

  template <typename F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const T v[kRun] = {sums_[i / 4][i % 4]};
      f(row() + 16 * (i / 4), col() + 16 * (i % 4), v);
    }
  }

 private:
  static __device__ int row() { return static_cast<int>(threadIdx.x) / 16; }
  static __device__ int col() { return static_cast<int>(threadIdx.x) % 16; }

  T sums_[4][4];
};

}  // namespace pyeff::cuda
