#pragma once
// The weights of the branches, packed for the tile one branch at a time.

#include "cpu/branch_conv2d_layout.h"
#include "cpu/transpose.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// [B, O, C / groups, kh, kw], contiguous, with the layout that a direction wants of it.
template <typename T>
class BranchWeights {
 public:
  using A = Accumulator<T>;

  static BranchWeights forward(const TensorView& weight, Index groups) {
    return BranchWeights(weight, groups, forward_layout(weight, groups), false);
  }
  static BranchWeights transposed(const TensorView& weight, Index groups) {
    return BranchWeights(weight, groups, transposed_layout(weight, groups), true);
  }

  const BranchLayout& layout() const { return layout_; }
  Index branches() const { return branches_; }

  // Writes layout().elements() elements.
  void pack(Index branch, A* to) const {
    const Index outputs = groups_ * out_;
    const T* from = data_ + branch * outputs * in_ * layout_.taps;
    if (layout_.depthwise) {
      for (Index p = 0; p < layout_.panels; ++p) pack_depthwise(from, p, to);
      return;
    }
    for (Index g = 0; g < groups_; ++g, from += out_ * in_ * layout_.taps) {
      for (Index p = 0; p < layout_.panels; ++p, to += layout_.panel_stride()) {
        if (transposed_) {
          pack_inputs(from, p * layout_.width, to);
        } else {
          pack_outputs(from, p * layout_.width, to);
        }
      }
    }
  }

 private:
  BranchWeights(const TensorView& weight, Index groups, const BranchLayout& layout, bool transposed)
      : data_(weight.as<const T>()),
        branches_(weight.shape[0]),
        groups_(groups),
        out_(weight.shape[1] / groups),
        in_(weight.shape[2]),
        layout_(layout),
        transposed_(transposed),
        end_(data_ + branches_ * groups_ * out_ * in_ * layout.taps) {}

  int lanes_from(Index lane) const {
    return static_cast<int>(larger(smaller(kLanes<A>, layout_.lanes - lane), 0));
  }

  // to[tap][input][lane]: a lane's numbers lie side by side, input by input.
  void pack_outputs(const T* from, Index lane, A* to) const {
    const Index taps = layout_.taps, columns = in_ * taps, width = layout_.width;
    for (Index l = 0; l < width; l += kLanes<A>, to += kLanes<A>) {
      const int lanes = lanes_from(lane + l);
      if (lanes == 0) {
        for (Index c = 0; c < columns; ++c) store(to + c * width, Vec<A>{});
        continue;
      }
      const T* rows = from + (lane + l) * columns;
      if (taps == 1) {
        transpose_columns<A>(rows, columns, lanes, columns, end_,
                             [&](Index c, Vec<A> v) { store(to + c * width, v); });
      } else {
        transpose_columns<A>(rows, columns, lanes, columns, end_, [&](Index c, Vec<A> v) {
          const Index in = static_cast<std::uint32_t>(c) / static_cast<std::uint32_t>(taps);
          store(to + ((c - in * taps) * in_ + in) * width, v);
        });
      }
    }
  }

  // to[tap][output][lane]: the taps of a lane lie side by side.
  void pack_inputs(const T* from, Index lane, A* to) const {
    const Index taps = layout_.taps, width = layout_.width;
    for (Index l = 0; l < width; l += kLanes<A>) {
      const int lanes = lanes_from(lane + l);
      for (Index o = 0; o < out_; ++o) {
        const T* rows = from + (o * in_ + lane + l) * taps;
        A* out = to + o * width + l;
        if (lanes == 0) {
          for (Index t = 0; t < taps; ++t) store(out + t * out_ * width, Vec<A>{});
        } else if (taps == 1 && lanes == kLanes<A>) {
          store(out, load_widened<A>(rows));
        } else {
          transpose_columns<A>(rows, taps, lanes, taps, end_,
                               [&](Index t, Vec<A> v) { store(out + t * out_ * width, v); });
        }
      }
    }
  }

  // to[tap][channel]
  void pack_depthwise(const T* from, Index panel, A* to) const {
    const Index taps = layout_.taps;
    for (Index l = panel * layout_.width; l < (panel + 1) * layout_.width; l += kLanes<A>) {
      const int lanes = lanes_from(l);
      if (lanes == 0) {
        for (Index t = 0; t < taps; ++t) store(to + t * layout_.tap_stride() + l, Vec<A>{});
        continue;
      }
      transpose_columns<A>(from + l * taps, taps, lanes, taps, end_,
                           [&](Index t, Vec<A> v) { store(to + t * layout_.tap_stride() + l, v); });
    }
  }

  const T* data_;
  Index branches_, groups_, out_, in_;  // outputs and inputs of a group
  BranchLayout layout_;
  bool transposed_;
  const T* end_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
