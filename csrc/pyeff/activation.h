#pragma once
// Elementwise functions that a kernel can apply before it writes its results.

namespace pyeff {

// In the order of pyeff/ops/_branch_steps.py.
enum class Activation { kNone, kRelu, kRelu6, kSilu, kHardswish };

}  // namespace pyeff
