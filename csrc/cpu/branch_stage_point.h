#pragma once
// The steps of a branch stage that are no convolutions: each writes one map from others, whole
// vectors of channels at a time. Lanes past a map's channels are written with anything.

#include <cstring>

#include "cpu/branch_stage_conv.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// --- pixel by pixel ------------------------------------------------------------------------------

// to(r, c, l) = f(r, c, l) for vectors of channels from l on, activated.
template <typename A, typename F>
void for_vectors(const SlotMap<A>& to, Activation activation, const F& f) {
  const Index lanes = padded_lanes(to.channels);
  for (Index r = 0; r < to.rows; ++r) {
    for (Index c = 0; c < to.cols; ++c) {
      A* out = to.at(r, c);
      for (Index l = 0; l < lanes; l += kLanes<A>)
        store(out + l, activated<A>(f(r, c, l), activation));
    }
  }
}

template <typename A>
void activate(const SlotMap<const A>& x, const SlotMap<A>& y, Activation activation) {
  for_vectors(y, activation, [&](Index r, Index c, Index l) { return load(x.at(r, c) + l); });
}

template <typename A>
void scale_shift(const SlotMap<const A>& x, const A* scale, const A* shift, const SlotMap<A>& y,
                 Activation activation) {
  for_vectors(y, activation, [&](Index r, Index c, Index l) {
    return load(x.at(r, c) + l) * load(scale + l) + load(shift + l);
  });
}

template <typename A>
void add(const SlotMap<const A>& a, const SlotMap<const A>& b, const SlotMap<A>& y,
         Activation activation) {
  for_vectors(y, activation, [&](Index r, Index c, Index l) {
    return load(a.at(r, c) + l) + load(b.at(r, c) + l);
  });
}

// Copies x to the channels of y from `channel` on, and no lane more.
template <typename A>
void copy_channels(const SlotMap<const A>& x, const SlotMap<A>& y, Index channel) {
  const std::size_t bytes = static_cast<std::size_t>(x.channels) * sizeof(A);
  for (Index r = 0; r < y.rows; ++r) {
    for (Index c = 0; c < y.cols; ++c) std::memcpy(y.at(r, c) + channel, x.at(r, c), bytes);
  }
}

// [C, H, W] in this order as one pixel.
template <typename A>
void flatten(const SlotMap<const A>& x, A* y) {
  for (Index r = 0; r < x.rows; ++r) {
    for (Index c = 0; c < x.cols; ++c) {
      const A* from = x.at(r, c);
      for (Index l = 0; l < x.channels; ++l) y[(l * x.rows + r) * x.cols + c] = from[l];
    }
  }
}

// --- pooling -------------------------------------------------------------------------------------

// Rows or columns [begin, end) of the source, every `step`-th; `size` counts the padding too.
struct Window {
  Index begin, end, step, size;
};

inline Window window_of(Index position, Index stride, Index kernel, Index dilation, Index before,
                        Index after, Index size) {
  const Index begin = position * stride - before, end = begin + (kernel - 1) * dilation + 1;
  const Index inside = smaller(end, size + after) - begin;
  const Index skipped = begin < 0 ? ceil_div(-begin, dilation) * dilation : 0;
  return {begin + skipped, smaller(end, size), dilation, inside};
}
inline Window bin_of(Index position, Index bins, Index size) {
  const Index begin = position * size / bins, end = ceil_div((position + 1) * size, bins);
  return {begin, end, 1, end - begin};
}

template <typename A>
Vec<A> most(const SlotMap<const A>& x, const Window& rows, const Window& cols, Index l) {
  Vec<A> best = Vec<A>{} - std::numeric_limits<A>::infinity();
  for (Index r = rows.begin; r < rows.end; r += rows.step) {
    for (Index c = cols.begin; c < cols.end; c += cols.step) {
      const Vec<A> v = load(x.at(r, c) + l);
      best = (v > best) | (v != v) ? v : best;
    }
  }
  return best;
}

template <typename A>
Vec<A> mean(const SlotMap<const A>& x, const Window& rows, const Window& cols, Index l,
            bool count_outside) {
  Vec<A> sum{};
  if (rows.begin >= rows.end || cols.begin >= cols.end) return sum;
  for (Index r = rows.begin; r < rows.end; ++r) {
    for (Index c = cols.begin; c < cols.end; ++c) sum += load(x.at(r, c) + l);
  }
  const Index count =
      count_outside ? rows.size * cols.size : (rows.end - rows.begin) * (cols.end - cols.begin);
  return sum / static_cast<A>(count);
}

template <typename A>
void pool(const StageStep& step, const SlotMap<const A>& x, const SlotMap<A>& y) {
  const bool adaptive = step.kind == StageKind::kAdaptivePool2d;
  for_vectors(y, step.activation, [&](Index r, Index c, Index l) {
    const Window rows = adaptive ? bin_of(r, step.bins_h, x.rows)
                                 : window_of(r, step.stride_h, step.kernel_h, step.dilation_h,
                                             step.top, step.bottom, x.rows);
    const Window cols = adaptive ? bin_of(c, step.bins_w, x.cols)
                                 : window_of(c, step.stride_w, step.kernel_w, step.dilation_w,
                                             step.left, step.right, x.cols);
    return step.average ? mean(x, rows, cols, l, step.count_include_pad) : most(x, rows, cols, l);
  });
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
