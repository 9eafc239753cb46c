#pragma once
// A row of a 2 x 2 maximum with a scale and a shift for every channel, beside a convolution's
// results.

#include "cpu/factorized_conv2d_call.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// The larger one; NaN where one is NaN, as in torch.
template <typename A>
inline A largest(A a, A b) {
  const A known = a > b ? a : b;  // one instruction, where || would be a branch
  return a != a ? a : known;
}
template <typename A>
inline Vec<A> largest_of(Vec<A> a, Vec<A> b) {
  const Vec<A> known = a > b ? a : b;
  return a != a ? a : known;
}

template <typename A>
inline Vec<A> load_wide(const A* from) {
  return load(from);
}
template <typename A>
inline void store_narrow(A* to, Vec<A> v) {
  store(to, v);
}
#ifdef __AVX512BF16__
// Compiler vectors, since GCC 12 warns about intrinsics that widen.
inline Vec<float> load_wide(const std::uint16_t* from) {
  typedef std::uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
  typedef std::uint32_t Words __attribute__((vector_size(64)));
  const Halves bits = *reinterpret_cast<const Halves*>(from);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Words) << 16);
}
inline void store_narrow(std::uint16_t* to, Vec<float> v) {
  const __m256bh bits = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(to, &bits, sizeof bits);
}
#endif

// What follows the maximum.
template <typename A>
struct PoolEpilogue {
  const A *scale, *shift;  // null for a call without pooling
  Activation activation;
};

// Two rows of `cols` pixels, `pixel` apart, of which the second may be the first one again.
template <typename R>
struct PooledRows {
  const R *upper, *lower;
  Index pixel, cols, channels;
};

// Writes `channels` of each pixel of a row, `to_pixel` apart; pixels beyond the last column are
// left out of the maximum.
template <typename R, typename A>
void pool_row(const PooledRows<R>& rows, const PoolEpilogue<A>& after, R* to, Index to_pixel) {
  const Index whole = rows.channels / kLanes<A> * kLanes<A>;
  for (Index c = 0; c < rows.cols; c += 2, to += to_pixel) {
    const Index right = c + 1 < rows.cols ? rows.pixel : 0;
    const R *upper = rows.upper + c * rows.pixel, *lower = rows.lower + c * rows.pixel;
    Index l = 0;
    for (; l < whole; l += kLanes<A>) {
      const Vec<A> top = largest_of<A>(load_wide(upper + l), load_wide(upper + right + l));
      const Vec<A> low = largest_of<A>(load_wide(lower + l), load_wide(lower + right + l));
      const Vec<A> v = largest_of<A>(top, low) * load(after.scale + l) + load(after.shift + l);
      store_narrow(to + l, activated<A>(v, after.activation));
    }
    if (l == rows.channels) continue;
    alignas(kVecBytes) A rest[kLanes<A>] = {};
    for (Index i = l; i < rows.channels; ++i) {
      const A top = largest<A>(widen(upper[i]), widen(upper[right + i]));
      const A low = largest<A>(widen(lower[i]), widen(lower[right + i]));
      rest[i - l] = largest(top, low) * after.scale[i] + after.shift[i];
    }
    store(rest, activated<A>(load(rest), after.activation));
    for (Index i = l; i < rows.channels; ++i) narrow(rest[i - l], to[i]);
  }
}

// pool_row for pixels of a few channels that lie side by side, which leave a vector almost empty: a
// maximum along whole rows first. `memory` holds a row; the activation is one that clamps.
template <typename A>
void pool_few(const PooledRows<A>& rows, const PoolEpilogue<A>& after, A* memory, A* to,
              Index to_pixel) {
  const Index channels = rows.channels;
  for (Index i = 0; i < rows.cols * channels; ++i) {
    memory[i] = largest(rows.upper[i], rows.lower[i]);
  }
  const Bounds<A> bounds = bounds_of<A>(after.activation);
  const A* left = memory;
  for (Index c = 0; c < rows.cols; c += 2, left += 2 * channels, to += to_pixel) {
    const A* right = c + 1 < rows.cols ? left + channels : left;
    for (Index i = 0; i < channels; ++i) {
      A v = largest(left[i], right[i]) * after.scale[i] + after.shift[i];
      v = v < bounds.low ? bounds.low : v;
      to[i] = v > bounds.high ? bounds.high : v;
    }
  }
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
