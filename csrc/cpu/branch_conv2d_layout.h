#pragma once
// The packed form of the weights of one branch, the same for every instruction set. Lanes are the
// channels of the destination, rows those of the source, which are summed.
//   dense       [groups][panels][kh * kw][rows][width]
//   depth-wise  [kh * kw][panels * width]
// Up to 16 lanes make a narrow panel: half-empty wide ones would waste half of the cache.
// Functions are static: objects of different instruction sets must not share code.

#include "cpu/packed_layout.h"

namespace pyeff::cpu {

struct BranchLayout {
  std::int64_t groups, panels;  // panels of each group
  std::int64_t taps, rows, lanes;
  std::int64_t width;
  bool depthwise;

  std::int64_t panel_count() const { return groups * panels; }
  std::int64_t tap_stride() const { return depthwise ? panels * width : rows * width; }
  std::int64_t panel_stride() const { return depthwise ? width : taps * rows * width; }
  std::int64_t elements() const { return groups * panels * taps * rows * width; }
};

static inline BranchLayout branch_layout(std::int64_t groups, std::int64_t taps, std::int64_t rows,
                                         std::int64_t lanes) {
  const bool depthwise = groups > 1 && rows == 1 && lanes == 1;
  if (depthwise) {
    lanes = groups;
    groups = 1;
  }
  const std::int64_t width = lanes <= kNarrow ? kNarrow : kPanel;
  return {groups, (lanes + width - 1) / width, taps, rows, lanes, width, depthwise};
}

// `weight` is [B, O, C / groups, kh, kw].
static inline BranchLayout forward_layout(const TensorView& weight, std::int64_t groups) {
  return branch_layout(groups, weight.shape[3] * weight.shape[4], weight.shape[2],
                       weight.shape[1] / groups);
}

// Of the input gradient, for which inputs and outputs change places.
static inline BranchLayout transposed_layout(const TensorView& weight, std::int64_t groups) {
  return branch_layout(groups, weight.shape[3] * weight.shape[4], weight.shape[1] / groups,
                       weight.shape[2]);
}

}  // namespace pyeff::cpu
