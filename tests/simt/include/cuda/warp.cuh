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

template <int kMatrices>
struct Matrices {
  const std::uint16_t* row;
  std::uint32_t r[kMatrices];
};

template <int kMatrices, bool kTrans>
void ldmatrix(std::uint32_t (&r)[kMatrices], const void* row, const simt::Site& site) {
  const int lane = simt::lane();
  if (lane < 8 * kMatrices) simt::require_shared(row, 16, site.what);
  Matrices<kMatrices> mine{static_cast<const std::uint16_t*>(row), {}};
  simt::meet(0xffffffffu, site, mine, [](Matrices<kMatrices>** lanes) {
    const auto element = [&](int matrix, int i, int j) {
      const int from = 8 * matrix + (kTrans ? j : i);
      return std::uint32_t{lanes[from]->row[kTrans ? i : j]};
    };
    for (int l = 0; l < simt::kWarp; ++l) {
      for (int matrix = 0; matrix < kMatrices; ++matrix) {
        const int i = l / 4, j = l % 4 * 2;
        lanes[l]->r[matrix] = element(matrix, i, j) | element(matrix, i, j + 1) << 16;
      }
    }
  });
  for (int i = 0; i < kMatrices; ++i) r[i] = mine.r[i];
}

struct Product {
  float* d;
  const std::uint32_t *a, *b;
};

template <typename T>
float half_of(std::uint32_t word, int half) {
  T value;
  value.bits = static_cast<std::uint16_t>(word >> 16 * half);
  return static_cast<float>(value);
}

struct Place {
  int lane, index, half;
};

// d += a b for [16, kDepth] by [kDepth, 8]; the places say who holds a number, read makes it one.
template <int kDepth, typename Read, typename PlaceA, typename PlaceB>
void multiply(Product** lanes, const Read& read, const PlaceA& place_a, const PlaceB& place_b) {
  float a[16][kDepth], b[kDepth][8];
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < 16; ++row) {
      const Place place = place_a(row, k);
      a[row][k] = read(lanes[place.lane]->a[place.index], place.half);
    }
    for (int col = 0; col < 8; ++col) {
      const Place place = place_b(k, col);
      b[k][col] = read(lanes[place.lane]->b[place.index], place.half);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int col = 0; col < 8; ++col) sum[col] += a[row][k] * b[k][col];
    }
    for (int col = 0; col < 8; ++col) {
      lanes[row % 8 * 4 + col / 2]->d[row / 8 * 2 + col % 2] += sum[col];
    }
  }
}

template <typename T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
         const simt::Site& site) {
  Product mine{d, a, b};
  simt::meet(0xffffffffu, site, mine, [](Product** lanes) {
    multiply<16>(
        lanes, [](std::uint32_t word, int half) { return half_of<T>(word, half); },
        [](int row, int k) { return Place{row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2}; },
        [](int k, int col) { return Place{col * 4 + k % 8 / 2, k / 8, k % 2}; });
  });
}

}  // namespace emulated

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, SIMT_HERE) {
  emulated::ldmatrix<4, false>(r, row, {"ldmatrix_x4", file, line});
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row, SIMT_HERE) {
  emulated::ldmatrix<4, true>(r, row, {"ldmatrix_x4_trans", file, line});
}
inline void ldmatrix_x2(std::uint32_t (&r)[2], const void* row, SIMT_HERE) {
  emulated::ldmatrix<2, false>(r, row, {"ldmatrix_x2", file, line});
}
inline void ldmatrix_x2_trans(std::uint32_t (&r)[2], const void* row, SIMT_HERE) {
  emulated::ldmatrix<2, true>(r, row, {"ldmatrix_x2_trans", file, line});
}

inline void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], __half,
                SIMT_HERE) {
  emulated::mma<__half>(d, a, b, {"mma", file, line});
}
inline void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                __nv_bfloat16, SIMT_HERE) {
  emulated::mma<__nv_bfloat16>(d, a, b, {"mma", file, line});
}

inline std::uint32_t to_tf32(float value) {
  return (simt::bits_as<std::uint32_t>(value) + 0x1000u) & ~0x1fffu;
}
inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                     SIMT_HERE) {
  emulated::Product mine{d, a, b};
  simt::meet(0xffffffffu, {"mma_tf32", file, line}, mine, [](emulated::Product** lanes) {
    emulated::multiply<8>(
        lanes,  // the low bits of an operand are not looked at
        [](std::uint32_t word, int) { return simt::bits_as<float>(word & ~0x1fffu); },
        [](int row, int k) { return emulated::Place{row % 8 * 4 + k % 4, row / 8 + k / 4 * 2, 0}; },
        [](int k, int col) { return emulated::Place{col * 4 + k % 4, k / 4, 0}; });
  });
}

}  // namespace pyeff::cuda
