#pragma once
// What the kernels of nested_conv2d are told: maps, the selected part of a weight, and where a
// kernel's taps lie.

#include <cstdint>

#include "cuda/common.cuh"
#include "cuda/load.cuh"
#include "pyeff/nested_conv2d.h"

namespace pyeff::cuda {

// [N, channels, height, width] with the channels side by side.
template <typename T>
struct Map {
  T* data;
  std::int64_t image, row, pixel;  // strides
  int images, height, width;
  bool vector;  // 16 bytes of channels can be copied at once, from any multiple of them on

  __device__ T* at(int n, int h, int w) const { return data + n * image + h * row + w * pixel; }
};

// `group_channels` is also where a group may begin.
template <typename T, typename Value = std::remove_const_t<T>>
Map<T> map_of(const TensorView& t, std::int64_t group_channels) {
  return {t.as<T>(),
          t.stride[0],
          t.stride[2],
          t.stride[3],
          static_cast<int>(t.shape[0]),
          static_cast<int>(t.shape[2]),
          static_cast<int>(t.shape[3]),
          aligned(t.as<Value>(), t, 1) && fills_chunks<Value>(group_channels)};
}

// One side of the full weight. Channels are numbered within the selection.
struct Side {
  const std::int64_t* index;  // or null
  std::int64_t lo, layer;     // first channel of a range; channels of the full side
  int count;                  // selected ones of a group

  // The channel of the full layer, or -1 where an index names none.
  __device__ std::int64_t channel(std::int64_t selected) const {
    if (index == nullptr) return lo + selected;
    const std::int64_t c = index[selected];
    return c >= 0 && c < layer ? c : -1;
  }
};

// weight [O, I / groups, kh, kw], by strides.
template <typename T>
struct Weight {
  T* data;
  std::int64_t out, in, row, col;  // strides
  Side outs, ins;
  bool vector;  // 16 bytes of selected inputs can be copied at once
};

template <typename T, typename Value = std::remove_const_t<T>>
Weight<T> weight_of(const TensorView& t, const NestedConv2d& conv, int groups) {
  const bool grouped = conv.groups > 1;
  const std::int64_t in_lo = grouped || conv.in.index != nullptr ? 0 : conv.in.lo;
  const Side outs{conv.out.index, conv.out.index != nullptr ? 0 : conv.out.lo, t.shape[0],
                  static_cast<int>(conv.out.count / groups)};
  const Side ins{conv.in.index, in_lo, t.shape[1], static_cast<int>(conv.in.count / groups)};
  const bool vector = ins.index == nullptr && (t.stride[1] == 1 || t.shape[1] == 1) &&
                      fills_chunks<Value>(ins.count) && aligned(t.as<Value>() + in_lo, t, 1);
  return {t.as<T>(), t.stride[0], t.stride[1], t.stride[2], t.stride[3], outs, ins, vector};
}

// How many groups take part.
inline int active_groups(const TensorView& weight, const NestedConv2d& conv) {
  if (conv.groups == 1) return 1;
  return static_cast<int>(conv.in.count / weight.shape[1]);
}

// One axis of a sum over taps, for the forward (result p reads p stride - pad + u dilation) and for
// the gradient of the input (result h reads (h + pad - u dilation) / stride where that is whole).
// Results of one remainder of h / stride have the same taps: they are a class.
struct Axis {
  int kernel, classes;  // taps; classes of results
  std::int64_t stride, pad, dilation;
  bool forward;
  int tap_step;  // from one tap of a class to its next
};

// The taps of a class: tap t is number first + t step and reads position base + t delta for the
// class's result 0; result i is at i * spread in the source and at i * gap + its class in the map.
struct Taps {
  int first, step, count;
  std::int64_t base, delta, spread, gap;

  __device__ Taps(const Axis& axis, int number) {
    first = 0;
    step = axis.tap_step;
    if (axis.forward) {
      count = axis.kernel;
      base = -axis.pad;
      delta = axis.dilation;
      spread = axis.stride;
      gap = 1;
      return;
    }
    spread = 1;
    gap = axis.stride;
    delta = -(step * axis.dilation / axis.stride);
    while (first < axis.kernel && (number + axis.pad - first * axis.dilation) % axis.stride != 0) {
      ++first;
    }
    count = first < axis.kernel ? (axis.kernel - 1 - first) / step + 1 : 0;
    base = count > 0 ? (number + axis.pad - first * axis.dilation) / axis.stride : 0;
  }
};

constexpr int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Depth-wise layers have kernels of their own: there is nothing to share between channels.
inline bool is_depthwise(const TensorView& weight, const NestedConv2d& conv) {
  return conv.groups > 1 && weight.shape[0] == conv.groups && weight.shape[1] == 1;
}
void depthwise_conv2d(const char* name, const TensorView& x, const TensorView& weight,
                      const TensorView* bias, const TensorView& y, const NestedConv2d& conv,
                      bool forward, void* stream);
void depthwise_grad_weight(const TensorView& grad_y, const TensorView& x,
                           const TensorView& grad_weight, const TensorView* workspace,
                           const NestedConv2d& conv, const NestedConv2dPlan& plan, void* stream);

// grad_weight = the sum over the shares of workspace [shares, o, kh, kw, i], in their order.
void sum_weight_shares(const TensorView& workspace, const TensorView& grad_weight,
                       const NestedConv2d& conv, std::int64_t shares, void* stream);

}  // namespace pyeff::cuda
