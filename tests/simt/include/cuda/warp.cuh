#pragma once
// csrc/cuda/warp.cuh for the host: the same names, found first on the include path.

#include "cuda/common.cuh"
#include "simt_runtime.h"

namespace pyeff::cuda {

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(simt::machine().shared);
}

template <int kBytes>
void cp_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::copy_later(shared, global, kBytes, valid);
}
inline void cp_async_16(void* shared, const void* global, bool valid) {
  cp_async<16>(shared, global, valid);
}
inline void cp_async_commit() { ++simt::machine().current->groups; }
template <int kPending>
void cp_async_wait() {
  simt::wait_for_copies(kPending);
}

namespace emulated {

template <bool kTrans>
void ldmatrix(std::uint32_t (&r)[4], const void* row, const simt::Site& site) {
  struct Operand {
    const std::uint16_t* row;
    std::uint32_t* r;
  } mine{static_cast<const std::uint16_t*>(row), r};
  simt::require_shared(row, 16, site.what);
  simt::meet(0xffffffffu, site, mine, [](Operand** lanes) {
    const auto element = [&](int matrix, int i, int j) {
      return std::uint32_t{lanes[8 * matrix + (kTrans ? j : i)]->row[kTrans ? i : j]};
    };
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      for (int matrix = 0; matrix < 4; ++matrix) {
        lanes[lane]->r[matrix] = element(matrix, i, j) | element(matrix, i, j + 1) << 16;
      }
    }
  });
}

// d += a b for [16, 8 kPack] by [8 kPack, 8], with kPack numbers in a word, which `read` takes out.
template <int kPack, typename Read>
void multiply(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
              const simt::Site& site, const Read& read) {
  struct Operand {
    float* d;
    const std::uint32_t *a, *b;
  } mine{d, a, b};
  simt::meet(0xffffffffu, site, mine, [&](Operand** lanes) {
    constexpr int kDepth = 8 * kPack, kStep = 4 * kPack;
    float left[16][kDepth], right[kDepth][8];
    for (int k = 0; k < kDepth; ++k) {
      const int lane = k % kStep / kPack, word = k / kStep, place = k % kPack;
      for (int row = 0; row < 16; ++row) {
        left[row][k] = read(lanes[row % 8 * 4 + lane]->a[row / 8 + 2 * word], place);
      }
      for (int col = 0; col < 8; ++col) right[k][col] = read(lanes[col * 4 + lane]->b[word], place);
    }
    for (int row = 0; row < 16; ++row) {
      float sum[8] = {};
      for (int k = 0; k < kDepth; ++k) {
        for (int col = 0; col < 8; ++col) sum[col] += left[row][k] * right[k][col];
      }
      for (int col = 0; col < 8; ++col) {
        lanes[row % 8 * 4 + col / 2]->d[row / 8 * 2 + col % 2] += sum[col];
      }
    }
  });
}

}  // namespace emulated

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, SIMT_HERE) {
  emulated::ldmatrix<false>(r, row, {"ldmatrix_x4", file, line});
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row, SIMT_HERE) {
  emulated::ldmatrix<true>(r, row, {"ldmatrix_x4_trans", file, line});
}

template <typename T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], T, SIMT_HERE) {
  emulated::multiply<2>(d, a, b, {"mma", file, line}, [](std::uint32_t word, int half) -> float {
    return simt::bits_as<T>(static_cast<std::uint16_t>(word >> 16 * half));
  });
}

inline std::uint32_t to_tf32(float value) {
  return (simt::bits_as<std::uint32_t>(value) + 0x1000u) & ~0x1fffu;
}
inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                     SIMT_HERE) {
  // The low bits of an operand are not looked at.
  emulated::multiply<1>(d, a, b, {"mma_tf32", file, line}, [](std::uint32_t word, int) {
    return simt::bits_as<float>(word & ~0x1fffu);
  });
}

}  // namespace pyeff::cuda
