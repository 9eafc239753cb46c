#pragma once
// A line of three taps and stride 1 as Winograd's F(4, 3): four outputs from six inputs with six
// products instead of twelve. Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// CVPR 2016, in one dimension. Inputs and outputs of an item lie `dilation` apart.

#include "cpu/factorized_conv2d_call.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Pointers to pixels; whole vectors of channels can be read at every input.
template <typename E, Index kPoints, Index kOutputs>
struct WinogradItem {
  const E* in[kPoints];
  E* out[kOutputs];             // null where there is no such pixel
  const E* residual[kOutputs];  // null where nothing is added
};

class WinogradLine {
 public:
  using Element = float;
  using Item = WinogradItem<float, kWinogradPoints, kWinogradOutputs>;
  static constexpr int kOutputs = kWinogradOutputs, kPoints = kWinogradPoints;

  explicit WinogradLine(const LineKernel<float>& line)
      : line_(line),
        in_pixel_(band_pixel<float>(padded_lanes(line.layout.in), 1)),
        out_pixel_(band_pixel<float>(line.layout.lanes(), 1)),
        clamps_(clamps(line.activation)),
        bounds_(bounds_of<float>(line.activation)) {}

  // Of a pixel that is read, with those that are zero.
  static Index readable_channels(Index channels) { return padded_lanes(channels); }
  static Index memory(const LineLayout& layout) {
    const Index in = band_pixel<float>(padded_lanes(layout.in), 1);
    const Index out = band_pixel<float>(layout.lanes(), 1);
    return kWinogradPoints * kChunk * (in + out);
  }

  // fill(q, item) describes item q of `count`; `memory` holds memory(layout) elements.
  template <typename Fill>
  void run(Index count, float* memory, const Fill& fill) const {
    Item items[kChunk];
    float* const sums = memory + kWinogradPoints * kChunk * in_pixel_;
    const int tiles = static_cast<int>(ceil_div(count, kTilePixels));
    for (int t = 0; t < tiles; t += kChunkTiles) {
      const int end_tile = static_cast<int>(smaller(t + kChunkTiles, tiles));
      const Index first = part_of(count, t, tiles).begin;
      const Index end = part_of(count, end_tile - 1, tiles).end;
      for (Index q = first; q < end; ++q) {
        fill(q, items[q - first]);
        transform_inputs(items[q - first], memory + (q - first) * in_pixel_);
      }
      multiply(end - first, end_tile - t, memory, sums);
      for (Index q = first; q < end; ++q) {
        transform_outputs(items[q - first], sums + (q - first) * out_pixel_);
      }
    }
  }

 private:
  // The weights of a position are read once for as many tiles.
  static constexpr int kChunkTiles = 28 / kTilePixels;
  static constexpr Index kChunk = kChunkTiles * kTilePixels;
  using V = Vec<float>;

  void transform_inputs(const Item& item, float* to) const {
    const Index step = kChunk * in_pixel_, channels = padded_lanes(line_.layout.in);
    const float* const* in = item.in;
    for (Index c = 0; c < channels; c += kLanes<float>, to += kLanes<float>) {
      const V x0 = load(in[0] + c), x1 = load(in[1] + c), x2 = load(in[2] + c);
      const V x3 = load(in[3] + c), x4 = load(in[4] + c), x5 = load(in[5] + c);
      const V a = x4 - 4.0f * x2, b = x3 - 4.0f * x1;
      const V e = x4 - x2, f = 2.0f * (x3 - x1);
      store(to, 4.0f * x0 + x4 - 5.0f * x2);
      store(to + step, a + b);
      store(to + 2 * step, a - b);
      store(to + 3 * step, e + f);
      store(to + 4 * step, e - f);
      store(to + 5 * step, 4.0f * x1 + x5 - 5.0f * x3);
    }
  }

  // sums[point][item] = in[point][item] * weights[point]
  void multiply(Index count, int tiles, const float* in, float* sums) const {
    static constexpr float kZeros[kPanel] = {};
    const LineLayout& layout = line_.layout;
    Tap<float> tap{};
    EpilogueCall<float> call{};
    call.taps = &tap;
    call.tap_count = 1;
    call.a_pixel = in_pixel_;
    call.init = kZeros;
    call.out_pixel = out_pixel_;
    for (Index point = 0; point < kWinogradPoints; ++point) {
      for (Index lane = 0; lane < layout.lanes(); lane += kPanel) {
        call.b_step = layout.width(lane);
        const Index vecs = call.b_step / kLanes<float>;
        for (Index v = 0; v < vecs; v += kTileVecs) {
          tap.b = line_.weights + layout.offset(lane, point) + v * kLanes<float>;
          tap.k = layout.in;
          for (int t = 0; t < tiles; ++t) {
            const Part part = part_of(count, t, tiles);
            tap.a = in + (point * kChunk + part.begin) * in_pixel_;
            call.out = sums + (point * kChunk + part.begin) * out_pixel_ + lane + v * kLanes<float>;
            run_epilogue_tile<DenseEpilogueTile>(1, static_cast<int>(part.end - part.begin),
                                                 static_cast<int>(smaller(kTileVecs, vecs - v)),
                                                 call);
          }
        }
      }
    }
  }

  void transform_outputs(const Item& item, const float* sums) const {
    const Index step = kChunk * out_pixel_, lanes = line_.layout.lanes();
    for (Index l = 0; l < lanes; l += kLanes<float>) {
      const float* m = sums + l;
      const V m0 = load(m), m1 = load(m + step), m2 = load(m + 2 * step);
      const V m3 = load(m + 3 * step), m4 = load(m + 4 * step), m5 = load(m + 5 * step);
      const V s = m1 + m2, d = m1 - m2, t = m3 + m4, u = m3 - m4;
      const V init = load(line_.init + l);
      finish(item, 0, l, m0 + s + t + init);
      finish(item, 1, l, 2.0f * u + d + init);
      finish(item, 2, l, 4.0f * t + s + init);
      finish(item, 3, l, 8.0f * u + d + (m5 + init));
    }
  }

  void finish(const Item& item, int output, Index l, V v) const {
    float* const out = item.out[output];
    if (out == nullptr) return;
    if (line_.scale != nullptr) v = v * load(line_.scale + l) + load(line_.shift + l);
    if (item.residual[output] != nullptr) v += load(item.residual[output] + l);
    if (clamps_) {
      v = clamped<float>(v, bounds_.low, bounds_.high);
    } else if (line_.activation != Activation::kNone) {
      v = activated<float>(v, line_.activation);
    }
    store(out + l, v);
  }

  const LineKernel<float>& line_;
  Index in_pixel_, out_pixel_;
  bool clamps_;
  Bounds<float> bounds_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
