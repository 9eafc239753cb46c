// nested_conv2d, forward and input gradient, as direct convolutions over weight panels.
//   y[n, o, h, w]  = bias[o] + sum_{i, u, v} x[n, i, h s + u d - p, w s + v d - p] W[o, i, u, v]
//   gx[n, i, h, w] = sum_{o, u, v} gy[n, o, (h + p - u d) / s, (w + p - v d) / s] W[o, i, u, v]
// where the divisions leave no remainder. Every output element is summed by one thread in a fixed
// order, whatever the number of threads.

#include "cpu/conv_plans.h"
#include "cpu/nested_conv2d_kernels.h"
#include "cpu/nested_conv2d_types.h"
#include "cpu/panels.h"

namespace pyeff::cpu::PYEFF_ISA {

void nested_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& grad_weight, const NestedConv2d& conv);

namespace {

template <typename Tile, typename T, typename Panels>
void convolve(const Image<const T>& source, const Image<T>& dest, const Plan& plan, Panels panels,
              int threads) {
  ImageConv<Tile, T, Panels>(source, dest, plan, panels).run(threads);
}

template <typename T>
void forward(const TensorView& x_view, const TensorView& weight_view, const TensorView* packed_view,
             const TensorView* bias_view, const TensorView& y_view, const NestedConv2d& conv) {
  using A = Accumulator<T>;
  const auto x = image_of<const T>(x_view);
  const auto y = image_of<T>(y_view);
  const auto weight = weight_of<T>(weight_view);
  const A* packed = packed_view == nullptr ? nullptr : packed_view->as<const A>();
  const T* bias = bias_view == nullptr ? nullptr : bias_view->as<const T>();
  const Plan& plan = forward_plan(weight.kernel_h, weight.kernel_w, conv.window, y.rows, y.cols);
  if (is_depthwise(weight_view, conv.groups)) {
    convolve<DepthwiseTile>(x, y, plan, DepthwisePanels<T>(weight, packed, conv.out, bias),
                            conv.threads);
    return;
  }
  const GroupedSelection in = grouped(conv.in, weight.in, conv.groups);
  const GroupedSelection out = grouped(conv.out, weight.out / conv.groups, conv.groups);
  if (packed == nullptr || out.index != nullptr) {
    convolve<DenseTile>(x, y, plan, GatheredPanels<T, false>(weight, in, out, bias), conv.threads);
  } else if (in.index != nullptr) {
    convolve<DenseTile>(x, y, plan, PackedPanels<T, true>(weight, packed, in, out, bias),
                        conv.threads);
  } else {
    convolve<DenseTile>(x, y, plan, PackedPanels<T, false>(weight, packed, in, out, bias),
                        conv.threads);
  }
}

template <typename T>
void grad_input(const TensorView& grad_y_view, const TensorView& weight_view,
                const TensorView& grad_x_view, const NestedConv2d& conv) {
  const auto grad_y = image_of<const T>(grad_y_view);
  const auto grad_x = image_of<T>(grad_x_view);
  const auto weight = weight_of<T>(weight_view);
  const T* no_bias = nullptr;
  const Plan& plan =
      grad_input_plan(weight.kernel_h, weight.kernel_w, conv.window, grad_x.rows, grad_x.cols);
  if (is_depthwise(weight_view, conv.groups)) {
    convolve<DepthwiseTile>(grad_y, grad_x, plan,
                            DepthwisePanels<T>(weight, nullptr, conv.in, no_bias), conv.threads);
    return;
  }
  const GroupedSelection in = grouped(conv.in, weight.in, conv.groups);
  const GroupedSelection out = grouped(conv.out, weight.out / conv.groups, conv.groups);
  convolve<DenseTile>(grad_y, grad_x, plan, GatheredPanels<T, true>(weight, out, in, no_bias),
                      conv.threads);
}

template <typename T>
void pack(const TensorView& weight_view, const TensorView& packed_view, Index groups, int threads) {
  using A = Accumulator<T>;
  const auto weight = weight_of<T>(weight_view);
  A* packed = packed_view.as<A>();
  if (is_depthwise(weight_view, groups)) {
    const Index row = depthwise_row(groups);
    for (Index t = 0; t < weight.taps(); ++t) {
      const T* from = weight.data + t / weight.kernel_w * weight.h_stride +
                      t % weight.kernel_w * weight.w_stride;
      for (Index c = 0; c < row; ++c) {
        packed[t * row + c] = c < groups ? widen(from[c * weight.out_stride]) : A(0);
      }
    }
    return;
  }
  const Index per_group = weight.out / groups, panels = ceil_div(per_group, kPanel);
  const Index elements = weight.taps() * weight.in * kPanel;
  threads = useful_threads(threads, double(groups * panels * elements));
  parallel(threads, [&](int thread, int of) {
    const Part part = part_of(groups * panels, thread, of);
    for (Index j = part.begin; j < part.end; ++j) {
      const Index lane = j % panels * kPanel;
      const int lanes = static_cast<int>(smaller(per_group - lane, kPanel));
      Index lane_offset[kPanel];
      for (int l = 0; l < lanes; ++l) {
        lane_offset[l] = (j / panels * per_group + lane + l) * weight.out_stride;
      }
      gather_panel(
          weight, lane_offset, lanes, weight.in, [&](Index row) { return row * weight.in_stride; },
          packed + j * elements);
    }
  });
}

void nested_conv2d_pack(const TensorView& weight, const TensorView& packed, Index groups,
                        int threads) {
  for_dtype(weight.dtype, [&](auto t) { pack<decltype(t)>(weight, packed, groups, threads); });
}

void nested_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* packed,
                           const TensorView* bias, const TensorView& y, const NestedConv2d& conv) {
  for_dtype(x.dtype, [&](auto t) { forward<decltype(t)>(x, weight, packed, bias, y, conv); });
}

void nested_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& grad_x, const NestedConv2d& conv) {
  for_dtype(grad_y.dtype, [&](auto t) { grad_input<decltype(t)>(grad_y, weight, grad_x, conv); });
}

}  // namespace

extern const NestedConv2dKernels nested_conv2d_kernels{&nested_conv2d_pack, &nested_conv2d_forward,
                                                       &nested_conv2d_grad_input,
                                                       &nested_conv2d_grad_weight};

}  // namespace pyeff::cpu::PYEFF_ISA
