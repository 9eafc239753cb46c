#pragma once
// One row of pixels of a 1-D convolution, in either direction: the taps are pointers to pixels.

#include "cpu/epilogue_tile.h"
#include "cpu/factorized_conv2d_layout.h"

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
  const A* init;
  const A *scale, *shift;  // or both null
  Activation activation;
};

template <typename A>
class LineConv {
 public:
  LineConv(const LineKernel<A>& line, Tap<A>* taps) : line_(line), taps_(taps) {}

  // Pixels of a tap are `a_pixel` apart.
  void run(const RowTap<A>* row_taps, Index tap_count, Index a_pixel, Index cols,
           const RowOut<A>& out) const {
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
        run_tiles<DenseEpilogueTile>(call, 1, cols, static_cast<int>(smaller(kTileVecs, vecs - v)));
      }
    }
    if (!call.clamps && line_.activation != Activation::kNone) activate(cols, out);
  }

 private:
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

  void activate(Index cols, const RowOut<A>& out) const {
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
