#pragma once
// Square blocks of numbers, as many vectors as a vector has lanes, transposed in registers.

#include <type_traits>
#include <utility>

#include "cpu/vec.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

template <typename A, int kFirst, std::size_t... I>
inline Vec<A> interleave(Vec<A> a, Vec<A> b, std::index_sequence<I...>) {
  constexpr int kCount = static_cast<int>(sizeof...(I));
  return __builtin_shufflevector(a, b,
                                 (kFirst + static_cast<int>(I) / 2 + (I % 2 == 0 ? 0 : kCount))...);
}

// A round that interleaves the first half of the vectors with the second doubles the distance
// between neighbours; after log2(lanes) of them rows are columns.
template <typename A>
inline void transpose(Vec<A> (&v)[kLanes<A>]) {
  constexpr int kCount = kLanes<A>, kHalf = kCount / 2;
  using Lanes = std::make_index_sequence<kCount>;
#pragma GCC unroll 8
  for (int round = 1; round < kCount; round *= 2) {
    Vec<A> next[kCount];
#pragma GCC unroll 32
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = interleave<A, 0>(v[i], v[i + kHalf], Lanes{});
      next[2 * i + 1] = interleave<A, kHalf>(v[i], v[i + kHalf], Lanes{});
    }
#pragma GCC unroll 32
    for (int i = 0; i < kCount; ++i) v[i] = next[i];
  }
}

// A vector of any element type in the accumulator's.
template <typename A, typename T>
inline Vec<A> load_widened(const T* from) {
  if constexpr (std::is_same_v<A, T>) {
    return load(from);
  } else {
    alignas(kVecBytes) A to[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) to[i] = widen(from[i]);
    return load(to);
  }
}

// Calls put(c, vector) for every column c of the matrix whose row l, of at most kLanes, starts at
// from + l * row_stride; missing rows are zero. Memory is read up to `end`, past the last column.
template <typename A, typename T, typename Put>
inline void transpose_columns(const T* from, Index row_stride, int rows, Index columns,
                              const T* end, const Put& put) {
  constexpr int kCount = kLanes<A>;
  if (rows <= 0) return;
  for (Index c = 0; c < columns; c += kCount) {
    // The last block starts earlier, where there is room for it.
    const Index first = c + kCount > columns && columns >= kCount ? columns - kCount : c;
    const int count = static_cast<int>(smaller(kCount, columns - first));
    Vec<A> v[kCount] = {};
    const T* block = from + first;
    if (end - block >= (rows - 1) * row_stride + kCount) {
      if (rows == kCount) {
#pragma GCC unroll 32
        for (int l = 0; l < kCount; ++l) v[l] = load_widened<A>(block + l * row_stride);
      } else {
        for (int l = 0; l < rows; ++l) v[l] = load_widened<A>(block + l * row_stride);
      }
    } else {
      for (int l = 0; l < rows; ++l) {
        for (int i = 0; i < count; ++i) v[l][i] = widen(block[l * row_stride + i]);
      }
    }
    transpose<A>(v);
    for (int i = 0; i < count; ++i) put(first + i, v[i]);
  }
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
