#pragma once
// A convolution from one map of a branch stage to another.

#include "cpu/branch_stage_layout.h"
#include "cpu/epilogue_tile.h"
#include "cpu/scratch.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// data points at pixel (0, 0); whole vectors of channels can be read and written at every pixel.
template <typename A>
struct SlotMap {
  A* data;
  Index channels, rows, cols;
  Index pixel, row;

  A* at(Index r, Index c) const { return data + r * row + c * pixel; }
  bool evenly_spaced() const { return rows == 1 || row == cols * pixel; }
};

template <typename A>
class StageConv {
 public:
  // The weights and biases are those of one branch, `taps` has room for every tap.
  StageConv(const StageStep& step, const A* weights, const A* biases, Tap<A>* taps)
      : step_(step), weights_(weights), biases_(biases), taps_(taps) {}

  // residual may be null.
  void run(const SlotMap<const A>& source, const SlotMap<A>& dest,
           const SlotMap<const A>* residual) const {
    EpilogueCall<A> call{};
    call.taps = taps_;
    call.a_row = step_.stride_h * source.row;
    call.a_pixel = step_.stride_w * source.pixel;
    call.out_row = dest.row;
    call.out_pixel = dest.pixel;
    if (residual != nullptr) {
      call.residual_row = residual->row;
      call.residual_pixel = residual->pixel;
    }
    call.clamps = clamps(step_.activation);
    const Bounds<A> bounds = bounds_of<A>(step_.activation);
    call.low = bounds.low;
    call.high = bounds.high;
    Index rows = dest.rows, cols = dest.cols;
    if (pointwise() && source.evenly_spaced() && dest.evenly_spaced() &&
        (residual == nullptr || residual->evenly_spaced())) {
      cols *= rows;
      rows = 1;
    }
    const A* added = residual == nullptr ? nullptr : residual->data;
    if (is_depthwise(step_)) {
      depthwise(call, source, dest.data, added, rows, cols);
    } else {
      for (Index g = 0; g < step_.groups; ++g) dense(call, g, source, dest, added, rows, cols);
    }
  }

 private:
  bool pointwise() const {
    return taps_of(step_) == 1 && step_.stride_h == 1 && step_.stride_w == 1 && step_.top == 0 &&
           step_.left == 0 && step_.bottom == 0 && step_.right == 0;
  }

  void dense(EpilogueCall<A> call, Index group, const SlotMap<const A>& source,
             const SlotMap<A>& dest, const A* residual, Index rows, Index cols) const {
    const Index lanes = group_lanes(step_), k = step_.rows_in;
    const A* weights = weights_ + group * group_weights(step_);
    const A* biases = biases_ + group * lanes;
    const Index dest_channel = group * (step_.out / step_.groups);
    for (Index lane = 0; lane < lanes; lane += kPanel) {
      const Index width = smaller(kPanel, lanes - lane);
      call.tap_count = list_taps(source, group * k, k, weights + lane * taps_of(step_) * k, width);
      call.b_step = width;
      const Index vecs = width / kLanes<A>;
      for (Index v = 0; v < vecs; v += kTileVecs) {
        const Index at = dest_channel + lane + v * kLanes<A>;
        call.b_offset = v * kLanes<A>;
        call.init = biases + lane + v * kLanes<A>;
        call.out = dest.data + at;
        call.residual = residual == nullptr ? nullptr : residual + at;
        run_tiles<DenseEpilogueTile>(call, rows, cols,
                                     static_cast<int>(smaller(kTileVecs, vecs - v)));
      }
    }
  }

  void depthwise(EpilogueCall<A> call, const SlotMap<const A>& source, A* out, const A* residual,
                 Index rows, Index cols) const {
    const Index lanes = padded_lanes(step_.out), vecs = lanes / kLanes<A>;
    call.tap_count = list_taps(source, 0, 1, weights_, lanes);
    for (Index v = 0; v < vecs; v += kTileVecs) {
      const Index at = v * kLanes<A>;
      call.a_offset = call.b_offset = at;
      call.init = biases_ + at;
      call.out = out + at;
      call.residual = residual == nullptr ? nullptr : residual + at;
      run_tiles<DepthwiseEpilogueTile>(call, rows, cols,
                                       static_cast<int>(smaller(kTileVecs, vecs - v)));
    }
  }

  // Neighbouring taps of a row whose pixels follow each other become one longer sum.
  Index list_taps(const SlotMap<const A>& source, Index channel, Index k, const A* weights,
                  Index width) const {
    const bool merges = step_.dilation_w == 1 && source.pixel == k;
    Index count = 0;
    for (Index u = 0; u < step_.kernel_h; ++u) {
      const A* row = source.at(u * step_.dilation_h - step_.top, -step_.left) + channel;
      const A* b = weights + u * step_.kernel_w * k * width;
      if (merges) {
        taps_[count++] = {row, b, step_.kernel_w * k};
        continue;
      }
      for (Index v = 0; v < step_.kernel_w; ++v) {
        taps_[count++] = {row + v * step_.dilation_w * source.pixel, b + v * k * width, k};
      }
    }
    return count;
  }

  const StageStep& step_;
  const A *weights_, *biases_;
  Tap<A>* taps_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
