#pragma once
// One row of pixels of a 1-D convolution, in either direction: the taps are pointers to pixels.

#include "cpu/epilogue_tile.h"
#include "cpu/factorized_conv2d_layout.h"
#include "cpu/factorized_conv2d_narrow.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Tap `number` of the kernel reads the row of pixels at `a`.
template <typename A>
struct RowTap {
  const A* a;
  Index number;
};

// A row of pixels that is written: padded_lanes of channels of each.
template <typename A>
struct RowOut {
  A* data;
  Index pixel;
  const A* residual;  // or null
  Index residual_pixel;
};

// A packed line with what follows it. The vectors have padded_lanes elements.
template <typename A>
struct LineKernel {
  LineLayout layout;
  const A* weights;
  const A* pairs;  // of bfloat16, or null
  const A* init;
  const A *scale, *shift;  // or both null
  Activation activation;
};

template <typename A>
class LineConv {
 public:
  using Row = A;

  LineConv(const LineKernel<A>& line, Tap<A>* taps) : line_(line), taps_(taps) {}

  // How many channels of a pixel are read.
  static Index readable_channels(Index channels) { return channels; }

  // Pixels of a tap are `a_pixel` apart. between() is called before every tile.
  template <typename Between>
  void run(const RowTap<A>* row_taps, Index tap_count, Index a_pixel, Index cols,
           const RowOut<A>& out, const Between& between) const {
    const LineLayout& layout = line_.layout;
    EpilogueCall<A> call{};
    call.taps = taps_;
    call.a_pixel = a_pixel;
    call.out_pixel = out.pixel;
    call.residual_pixel = out.residual_pixel;
    call.clamps = clamps(line_.activation);
    const Bounds<A> bounds = bounds_of<A>(line_.activation);
    call.low = bounds.low;
    call.high = bounds.high;
    if constexpr (NarrowTile::kExists<A>) {
      if (layout.in == NarrowTile::kChannels && layout.lanes() == NarrowTile::kChannels &&
          a_pixel == NarrowTile::kChannels) {
        run_narrow(row_taps, tap_count, cols, out, call, between);
        return;
      }
    }
    for (Index lane = 0; lane < layout.lanes(); lane += kPanel) {
      call.b_step = layout.width(lane);
      call.tap_count = list_taps(row_taps, tap_count, lane);
      const Index vecs = call.b_step / kLanes<A>;
      for (Index v = 0; v < vecs; v += kTileVecs) {
        const Index at = lane + v * kLanes<A>;
        call.b_offset = v * kLanes<A>;
        call.init = line_.init + at;
        if (line_.scale != nullptr) {
          call.scale = line_.scale + at;
          call.shift = line_.shift + at;
        }
        call.out = out.data + at;
        call.residual = out.residual == nullptr ? nullptr : out.residual + at;
        run_row(call, cols, static_cast<int>(smaller(kTileVecs, vecs - v)), between);
      }
    }
    activate(cols, out);
  }

  // How often between() is called for a row.
  Index tiles(Index cols) const {
    return ceil_div(cols, kTilePixels) * ceil_div(line_.layout.lanes(), kTileVecs * kLanes<A>);
  }

 private:
  template <typename Between>
  static void run_row(EpilogueCall<A> call, Index cols, int vecs, const Between& between) {
    A* const out = call.out;
    const A* const residual = call.residual;
    const int tiles = static_cast<int>(ceil_div(cols, kTilePixels));
    for (int t = 0; t < tiles; ++t) {
      const Part part = part_of(cols, t, tiles);
      call.a_offset = part.begin * call.a_pixel;
      call.out = out + part.begin * call.out_pixel;
      if (residual != nullptr) call.residual = residual + part.begin * call.residual_pixel;
      between();
      run_epilogue_tile<DenseEpilogueTile>(1, static_cast<int>(part.end - part.begin), vecs, call);
    }
  }

  template <typename Between>
  void run_narrow(const RowTap<A>* row_taps, Index tap_count, Index cols, const RowOut<A>& out,
                  EpilogueCall<A> call, const Between& between) const {
    for (Index t = 0; t < tap_count; ++t) {
      const A* weights = line_.weights + line_.layout.offset(0, row_taps[t].number);
      taps_[t] = {row_taps[t].a, weights, NarrowTile::kChannels};
    }
    call.tap_count = tap_count;
    call.init = line_.init;
    call.scale = line_.scale;
    call.shift = line_.shift;
    call.out = out.data;
    call.residual = out.residual;
    NarrowTile::run_row(call, cols, between);
    activate(cols, out);
  }

  // Neighbouring taps whose pixels follow each other become one longer sum.
  Index list_taps(const RowTap<A>* row_taps, Index tap_count, Index lane) const {
    const LineLayout& layout = line_.layout;
    Index count = 0;
    for (Index t = 0; t < tap_count; ++t) {
      const A *a = row_taps[t].a, *b = line_.weights + layout.offset(lane, row_taps[t].number);
      if (count > 0) {
        Tap<A>& before = taps_[count - 1];
        if (before.a + before.k == a && before.b + before.k * layout.width(lane) == b) {
          before.k += layout.in;
          continue;
        }
      }
      taps_[count++] = {a, b, layout.in};
    }
    return count;
  }

  // What the tile could not do in its registers.
  void activate(Index cols, const RowOut<A>& out) const {
    if (clamps(line_.activation) || line_.activation == Activation::kNone) return;
    for (Index c = 0; c < cols; ++c) {
      A* pixel = out.data + c * out.pixel;
      for (Index l = 0; l < line_.layout.lanes(); l += kLanes<A>) {
        store(pixel + l, activated<A>(load(pixel + l), line_.activation));
      }
    }
  }

  const LineKernel<A>& line_;
  Tap<A>* taps_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
