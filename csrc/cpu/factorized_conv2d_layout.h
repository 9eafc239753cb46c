#pragma once
// The packed form of the weight [O, I, n] of a 1-D convolution, the same for every instruction set.
//   direct     [panels][n][I][width]
//   Winograd   [panels][6][I][width], the weights transformed
//   bfloat16   the direct form in float32, then [panels][n][ceil(I / 2)][width] pairs of bfloat16,
//              or for Winograd's F(2, 3) [panels][4][I / 2][width] of them, I up to a multiple of
//              32
// Panels are kPanel output channels wide, the last one kNarrow where that suffices; missing ones
// are zero. Functions are static: objects of different instruction sets must not share code.

#include "cpu/packed_layout.h"
#include "pyeff/factorized_conv2d.h"

namespace pyeff::cpu {

inline constexpr std::int64_t kWinogradTaps = 3, kWinogradOutputs = 4, kWinogradPoints = 6;
// Of F(2, 3), in bfloat16, whose inputs are combined so many channels at a time.
inline constexpr std::int64_t kPairOutputs = 2, kPairPoints = 4, kPairBlock = 32;

struct LineLayout {
  std::int64_t in, out, taps;
  std::int64_t positions;  // taps, or points of the transformed weight
  bool paired;             // pairs of bfloat16 follow
  std::int64_t pair_positions;

  std::int64_t lanes() const { return padded_lanes(out); }
  bool combines_pairs() const { return pair_positions != taps; }
  // A pair is as large as a float32.
  std::int64_t pairs() const {
    return combines_pairs() ? (in + kPairBlock - 1) / kPairBlock * (kPairBlock / 2) : (in + 1) / 2;
  }
  std::int64_t wide_elements() const { return positions * in * lanes(); }
  std::int64_t elements() const {
    return wide_elements() + (paired ? pair_positions * pairs() * lanes() : 0);
  }
  std::int64_t width(std::int64_t lane) const {
    return lanes() - lane < kPanel ? lanes() - lane : kPanel;
  }
  // Of the weights of one position of the panel that starts at `lane`.
  std::int64_t offset(std::int64_t lane, std::int64_t position) const {
    return lane * positions * in + position * in * width(lane);
  }
  std::int64_t pair_offset(std::int64_t lane, std::int64_t position) const {
    return lane * pair_positions * pairs() + position * pairs() * width(lane);
  }
};

// `weight` is [O, I, n, 1] or [O, I, 1, n].
static inline LineLayout line_layout(const TensorView& weight, bool winograd) {
  const std::int64_t taps = weight.shape[2] * weight.shape[3];
  const bool paired = weight.dtype == Dtype::kBFloat16;
  return {weight.shape[1],
          weight.shape[0],
          taps,
          winograd && !paired ? kWinogradPoints : taps,
          paired,
          winograd ? kPairPoints : taps};
}
static inline LineLayout line_layout(const Line& line, bool winograd) {
  LineLayout layout = line_layout(line.weight, winograd);
  if (line.transposed) {
    layout.in = line.weight.shape[0];
    layout.out = line.weight.shape[1];
  }
  return layout;
}

}  // namespace pyeff::cpu
