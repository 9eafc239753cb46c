#pragma once
// The packed form of a weight, the same for every instruction set.
//   dense       [groups][ceil(O / groups / kPanel)][kh * kw][I / groups][kPanel]
//   depth-wise  [kh * kw][depthwise_row(groups)]
// Functions are static: objects of different instruction sets must not share code.

#include "pyeff/tensor_view.h"

namespace pyeff::cpu {

inline constexpr int kPanel = 32;  // output channels of a weight panel

// Panels that are made for one operator alone may be this narrow.
inline constexpr std::int64_t kNarrow = 16;

static inline std::int64_t padded_lanes(std::int64_t channels) {
  return (channels + kNarrow - 1) / kNarrow * kNarrow;
}

// One weight per channel and position; with one group a selection need not be whole groups.
static inline bool is_depthwise(const TensorView& weight, std::int64_t groups) {
  return groups > 1 && weight.shape[0] == groups && weight.shape[1] == 1;
}

// A panel that starts at any channel can be read whole.
static inline std::int64_t depthwise_row(std::int64_t groups) {
  return (groups + kPanel - 1) / kPanel * kPanel + kPanel;
}

}  // namespace pyeff::cpu
