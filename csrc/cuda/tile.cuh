#pragma once
// A block's tile of sums, by tensor cores or by fused multiply-adds, from panels in shared memory.
// Both kinds of tile have the same members:
//
//   clear()         sums = 0
//   multiply(a, b)  sums[row, col] += sum over kDepth of k of a[row, k] b[col, k]
//   each(f)         f(row, col, v) for every kRun adjacent sums v[kRun] of the thread
//
// a and b lie ByRow or ByDepth.

#include <cstdint>

#include "cuda/common.cuh"
#include "cuda/warp.cuh"

namespace pyeff::cuda {

// kRun elements that one instruction moves.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Run {
  T v[kCount];
};

// A panel [rows, kDepth] in shared memory, `pitch` elements from one row to the next.
template <typename T>
struct ByRow {
  const T* data;
  int pitch;
};
// A panel [kDepth, rows].
template <typename T>
struct ByDepth {
  const T* data;
  int pitch;
};
template <typename T>
ByRow(const T*, int) -> ByRow<T>;
template <typename T>
ByDepth(const T*, int) -> ByDepth<T>;

// How kRows rows of a tile lie, with pitches that keep what a warp reads at a time in different
// banks: ByRow the distance between rows, in 16 bytes, is odd.
template <typename Tile, int kRows>
struct RowPanel {
  static constexpr int kLines = kRows, kWidth = Tile::kDepth, kPitch = kWidth + Tile::kPad;
  static constexpr int kElements = kLines * kPitch;
};
template <typename Tile, int kRows>
struct DepthPanel {
  static constexpr int kLines = Tile::kDepth, kWidth = kRows, kPitch = kWidth + Tile::kDepthPad;
  static constexpr int kElements = kLines * kPitch;
};

// A tile's type as an argument.
template <typename Tile>
struct TypeOf {
  using type = Tile;
};

// --- tensor cores --------------------------------------------------------------------------------

// A register of a fragment holds one of four parts of 16 rows by a step of k: which half of the
// rows, and which of k. They lie in one order in a product's left operand, in the other in two
// right ones side by side.
enum class Operand { kLeft, kRight };
template <Operand kSide>
__host__ __device__ constexpr int half_of_rows(int part) {
  return kSide == Operand::kLeft ? part % 2 : part / 2;
}
template <Operand kSide>
__host__ __device__ constexpr int half_of_depth(int part) {
  return kSide == Operand::kLeft ? part / 2 : part % 2;
}

// Rows `row` to row + 15 and a step of k; float is rounded to TF32.
template <Operand kSide, typename T>
__device__ __forceinline__ void fetch(std::uint32_t (&parts)[4], const ByRow<T>& panel, int row,
                                      int k) {
  // 8 x 8 parts of 16 bits, or 8 x 4 of 32: ldmatrix moves rows of 16 bytes whatever they hold.
  constexpr int kHalfStep = 16 / static_cast<int>(sizeof(T));
  const int lane = threadIdx.x % 32, part = lane / 8;
  const int line = row + half_of_rows<kSide>(part) * 8 + lane % 8;
  ldmatrix_x4(parts, panel.data + line * panel.pitch + k + half_of_depth<kSide>(part) * kHalfStep);
  if constexpr (sizeof(T) == 4) {
    // Products in TF32 would cut what ldmatrix moved; to the nearest is no further than half as
    // far.
#pragma unroll
    for (std::uint32_t& bits : parts) bits = to_tf32(__uint_as_float(bits));
  }
}

template <Operand kSide, typename T>
__device__ __forceinline__ void fetch(std::uint32_t (&parts)[4], const ByDepth<T>& panel, int row,
                                      int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const int part = lane / 8, line = k + half_of_depth<kSide>(part) * 8 + lane % 8;
    ldmatrix_x4_trans(parts, panel.data + line * panel.pitch + row + half_of_rows<kSide>(part) * 8);
  } else {  // nothing transposes 32 bits: every lane fetches its own
    const T* const from = panel.data + (k + lane % 4) * panel.pitch + row + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      parts[i] =
          to_tf32(from[half_of_depth<kSide>(i) * 4 * panel.pitch + half_of_rows<kSide>(i) * 8]);
    }
  }
}

// A warp owns kWarpRows rows by kWarpCols columns. float is multiplied in TF32.
template <typename T, int kTileRows, int kTileCols, int kDepthBytes, int kWarpRows = 32,
          int kWarpCols = kTileCols < 32 ? kTileCols : 32>
class TensorTile {
 public:
  using Value = T;
  static constexpr int kRows = kTileRows, kCols = kTileCols;
  static constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
  static constexpr int kPad = 16 / static_cast<int>(sizeof(T)), kDepthPad = 8;
  static constexpr int kSumsPitch = kCols + 8;  // of sums in shared memory
  static constexpr int kRun = 2;
  static constexpr int kWarpsAcross = kCols / kWarpCols;
  static constexpr int kThreads = 32 * (kRows / kWarpRows) * kWarpsAcross;
  static_assert(kRows % kWarpRows == 0 && kCols % kWarpCols == 0);
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 16 == 0 && kDepthBytes % 32 == 0);

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

  template <typename A, typename B>
  __device__ void multiply(const A& a, const B& b) {
    constexpr int kStep = 32 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
      std::uint32_t left[kBlocksDown][4], right[kBlocksAcross][4];
#pragma unroll
      for (int i = 0; i < kBlocksDown; ++i) {
        fetch<Operand::kLeft>(left[i], a, first_row() + i * 16, k);
      }
#pragma unroll
      for (int j = 0; j < kBlocksAcross; ++j) {
        fetch<Operand::kRight>(right[j], b, first_col() + j * 16, k);
      }
#pragma unroll
      for (int i = 0; i < kBlocksDown; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kBlocksAcross; ++j) {
          const std::uint32_t pair[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          if constexpr (sizeof(T) == 4) {
            mma_tf32(sums_[i][j], left[i], pair);
          } else {
            mma(sums_[i][j], left[i], pair, T{});
          }
        }
      }
    }
  }

  template <typename F>
  __device__ void each(const F& f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * kBlocksDown; ++i) {  // of 8 rows
      const int row = first_row() + i * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < 2 * kBlocksAcross; ++j) {
        const float v[kRun] = {sums_[i / 2][j][i % 2 * 2], sums_[i / 2][j][i % 2 * 2 + 1]};
        f(row, first_col() + j * 8 + lane % 4 * 2, v);
      }
    }
  }

 private:
  // Of 16 rows, of 16 columns.
  static constexpr int kBlocksDown = kWarpRows / 16, kBlocksAcross = kWarpCols / 16;

  static __device__ int first_row() {
    return static_cast<int>(threadIdx.x) / 32 / kWarpsAcross * kWarpRows;
  }
  static __device__ int first_col() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsAcross * kWarpCols;
  }

  float sums_[kBlocksDown][2 * kBlocksAcross][4];
};

// --- one multiply-add at a time ------------------------------------------------------------------

// kCount of k from `k` on, of one row.
template <int kCount, typename T>
__device__ __forceinline__ Run<T, kCount> fetch_run(const ByRow<T>& panel, int row, int k) {
  return *reinterpret_cast<const Run<T, kCount>*>(panel.data + row * panel.pitch + k);
}
template <int kCount, typename T>
__device__ __forceinline__ Run<T, kCount> fetch_run(const ByDepth<T>& panel, int row, int k) {
  Run<T, kCount> run;
#pragma unroll
  for (int i = 0; i < kCount; ++i) run.v[i] = panel.data[(k + i) * panel.pitch + row];
  return run;
}

// float and double in full precision. 256 threads of 4 x 4 sums, 16 rows and columns apart.
template <typename T>
class SimtTile {
 public:
  using Value = T;
  static constexpr int kRows = 64, kCols = 64;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kPad = 16 / static_cast<int>(sizeof(T));
  static constexpr int kDepthPad = kPad, kSumsPitch = kCols + kPad;
  static constexpr int kRun = 1;
  static constexpr int kThreads = 256;

  __device__ void clear() {
#pragma unroll
    for (auto& row : sums_) {
#pragma unroll
      for (T& sum : row) sum = T(0);
    }
  }

  template <typename A, typename B>
  __device__ void multiply(const A& a, const B& b) {
#pragma unroll
    for (int k = 0; k < kDepth; k += kPad) {
      Run<T, kPad> left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] = fetch_run<kPad>(a, row() + 16 * i, k);
        right[i] = fetch_run<kPad>(b, col() + 16 * i, k);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) {
#pragma unroll
        for (int l = 0; l < kPad; ++l) sums_[i / 4][i % 4] += left[i / 4].v[l] * right[i % 4].v[l];
      }
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

// Calls body(TypeOf<Tile>{}) with the tile of 64 x 64 that multiplies T: by tensor cores, but for
// double, and for float unless it may be rounded to TF32.
template <typename T, typename Body>
void with_tile(bool tf32, const Body& body) {
  if (sizeof(T) == 8 || (sizeof(T) == 4 && !tf32)) {
    if constexpr (sizeof(T) >= 4) return body(TypeOf<SimtTile<T>>{});
  }
  if constexpr (sizeof(T) <= 4) body(TypeOf<TensorTile<T, 64, 64, 64>>{});
}

// --- the way through shared memory ---------------------------------------------------------------

// A sum whose operands pass through kStages buffers of `size` elements: load(step, buffer) starts
// the copies of a step, add(step, buffer) uses them kStages - 1 steps later. Steps are loaded in
// their order. Copies that the caller has started come with the first step.
template <int kStages, typename T, typename Count, typename Load, typename Add>
__device__ __forceinline__ void run_stages(T* buffers, int size, Count steps, const Load& load,
                                           const Add& add) {
  const auto fetch_step = [&](Count step) {
    if (step < steps) load(step, buffers + step % kStages * size);
    cp_async_commit();  // an empty group keeps the count
  };
  for (int step = 0; step < kStages - 1; ++step) fetch_step(step);
  for (Count step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the step is there, and the buffer of the one before it is free
    fetch_step(step + kStages - 1);
    add(step, static_cast<const T*>(buffers + step % kStages * size));
  }
}

}  // namespace pyeff::cuda
