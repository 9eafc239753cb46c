#pragma once
// The weights of a 1-D convolution, packed for the tile.

#include <type_traits>

#include "cpu/factorized_conv2d_layout.h"
#include "cpu/vec.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// [O, I, n] with any strides.
template <typename T>
struct LineWeight {
  const T* data;
  Index out_stride, in_stride, tap_stride;
};
template <typename T>
LineWeight<T> line_weight_of(const TensorView& t) {
  const int along = t.shape[2] > 1 ? 2 : 3;
  return {t.as<const T>(), t.stride[0], t.stride[1], t.stride[along]};
}

template <typename T>
LineWeight<T> line_weight_of(const Line& line) {
  const LineWeight<T> w = line_weight_of<T>(line.weight);
  if (!line.transposed) return w;
  const Index taps = line.weight.shape[2] * line.weight.shape[3];
  return {w.data + (taps - 1) * w.tap_stride, w.in_stride, w.out_stride, -w.tap_stride};
}

// Winograd's transform of three taps: F(4, 3) with the points 0, 1, -1, 2, -2 and infinity.
inline void transform_taps(const double (&tap)[kWinogradTaps], double (&point)[kWinogradPoints]) {
  const double even = tap[0] + tap[2], far = tap[0] + 4 * tap[2];
  point[0] = tap[0] / 4;
  point[1] = -(even + tap[1]) / 6;
  point[2] = -(even - tap[1]) / 6;
  point[3] = (far + 2 * tap[1]) / 24;
  point[4] = (far - 2 * tap[1]) / 24;
  point[5] = tap[2];
}

template <typename T, typename A>
void pack_line(const LineWeight<T>& weight, const LineLayout& layout, A* to) {
  const bool winograd = layout.positions != layout.taps;
  for (Index lane = 0; lane < layout.lanes(); ++lane) {
    const Index panel = lane / kPanel * kPanel, width = layout.width(panel);
    for (Index i = 0; i < layout.in; ++i) {
      A* out = to + layout.offset(panel, 0) + i * width + lane - panel;
      const Index step = layout.in * width;  // to the next position
      if (lane >= layout.out) {
        for (Index p = 0; p < layout.positions; ++p) out[p * step] = A(0);
        continue;
      }
      const T* from = weight.data + lane * weight.out_stride + i * weight.in_stride;
      if (winograd) {
        double taps[kWinogradTaps], points[kWinogradPoints];
        for (Index t = 0; t < kWinogradTaps; ++t) taps[t] = widen(from[t * weight.tap_stride]);
        transform_taps(taps, points);
        for (Index p = 0; p < kWinogradPoints; ++p) out[p * step] = static_cast<A>(points[p]);
      } else {
        for (Index t = 0; t < layout.taps; ++t) out[t * step] = widen(from[t * weight.tap_stride]);
      }
    }
  }
}

// Of F(2, 3), in the signs that the combined inputs have.
inline void transform_pair_taps(const float (&tap)[kWinogradTaps], float (&point)[kPairPoints]) {
  const float even = tap[0] + tap[2];
  point[0] = tap[0];
  point[1] = 0.5f * (even + tap[1]);
  point[2] = 0.5f * (even - tap[1]);
  point[3] = tap[2];
}

// The channel at a place of the combined inputs: of a block the even ones lie before the odd ones.
inline Index channel_at(Index place) {
  const Index block = place / kPairBlock * kPairBlock, in_block = place - block;
  constexpr Index kHalf = kPairBlock / 2;
  return block + (in_block < kHalf ? 2 * in_block : 2 * (in_block - kHalf) + 1);
}

// The pairs of bfloat16 that follow the wide form; a missing channel is zero.
inline void pack_pairs(const LineWeight<BFloat16>& weight, const LineLayout& layout,
                       std::uint16_t* to) {
  const bool combines = layout.combines_pairs();
  for (Index lane = 0; lane < layout.lanes(); ++lane) {
    const Index panel = lane / kPanel * kPanel, width = layout.width(panel);
    for (Index i = 0; i < 2 * layout.pairs(); ++i) {
      const Index channel = combines ? channel_at(i) : i;
      const bool missing = lane >= layout.out || channel >= layout.in;
      const BFloat16* from = weight.data + lane * weight.out_stride + channel * weight.in_stride;
      float taps[kWinogradTaps], points[kPairPoints];
      if (combines && !missing) {
        for (Index t = 0; t < kWinogradTaps; ++t) taps[t] = widen(from[t * weight.tap_stride]);
        transform_pair_taps(taps, points);
      }
      for (Index t = 0; t < layout.pair_positions; ++t) {
        const Index pair = layout.pair_offset(panel, t) + i / 2 * width + lane - panel;
        BFloat16 value{};
        if (!missing && combines) narrow(points[t], value);
        if (!missing && !combines) value = from[t * weight.tap_stride];
        to[2 * pair + i % 2] = value.bits;
      }
    }
  }
}

// Everything of the packed form.
template <typename T, typename A>
void pack_weight(const LineWeight<T>& weight, const LineLayout& layout, A* to) {
  pack_line(weight, layout, to);
  if constexpr (std::is_same_v<T, BFloat16>) {
    pack_pairs(weight, layout, reinterpret_cast<std::uint16_t*>(to + layout.wide_elements()));
  }
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
