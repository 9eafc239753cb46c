#pragma once
// Where a convolution's kernel lies over the map: the Plan of each direction.

#include "cpu/image.h"
#include "pyeff/conv_window.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Of the calling thread, so that its memory is kept from call to call.
inline Plan& empty_plan() {
  static thread_local Plan plan;
  plan.phases.clear();
  plan.offsets.clear();
  return plan;
}

// Of y, which has `rows` and `cols`.
inline Plan& forward_plan(Index kernel_h, Index kernel_w, const ConvWindow& window, Index rows,
                          Index cols) {
  Plan& plan = empty_plan();
  plan.step_h = window.stride_h;
  plan.step_w = window.stride_w;
  plan.dest_step_h = plan.dest_step_w = 1;
  for (Index u = 0; u < kernel_h; ++u) {
    for (Index v = 0; v < kernel_w; ++v) {
      plan.offsets.push_back({u * window.dilation_h - window.pad_top,
                              v * window.dilation_w - window.pad_left, u * kernel_w + v});
    }
  }
  plan.phases.push_back({0, 0, rows, cols, 0, kernel_h * kernel_w});
  plan.finish();
  return plan;
}

// Of the gradient of x, which has `rows` and `cols`. Positions h = first + r * stride of one
// residue read gy at r + dy: no zeros are inserted.
inline Plan& grad_input_plan(Index kernel_h, Index kernel_w, const ConvWindow& window, Index rows,
                             Index cols) {
  Plan& plan = empty_plan();
  plan.step_h = plan.step_w = 1;
  plan.dest_step_h = window.stride_h;
  plan.dest_step_w = window.stride_w;
  for (Index i = 0; i < smaller(window.stride_h, rows); ++i) {
    for (Index j = 0; j < smaller(window.stride_w, cols); ++j) {
      const Index begin = static_cast<Index>(plan.offsets.size());
      for (Index u = 0; u < kernel_h; ++u) {
        const Index dy = i + window.pad_top - u * window.dilation_h;
        if (dy % window.stride_h != 0) continue;
        for (Index v = 0; v < kernel_w; ++v) {
          const Index dx = j + window.pad_left - v * window.dilation_w;
          if (dx % window.stride_w != 0) continue;
          plan.offsets.push_back({dy / window.stride_h, dx / window.stride_w, u * kernel_w + v});
        }
      }
      plan.phases.push_back({i, j, ceil_div(rows - i, window.stride_h),
                             ceil_div(cols - j, window.stride_w), begin,
                             static_cast<Index>(plan.offsets.size())});
    }
  }
  plan.finish();
  return plan;
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
