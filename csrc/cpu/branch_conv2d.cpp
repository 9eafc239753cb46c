// branch_conv2d, forward and input gradient, with b = index[n, j]:
//   y[n, j, o, h, w]  = bias[b, o] + sum_{i, u, v} x[n, (j,) i, h s + u d - p, w s + v d - p]
//                                                  W[b, o, i, u, v]
//   gx[n, j, i, h, w] = sum_{o, u, v} gy[n, j, o, (h + p - u d) / s, (w + p - v d) / s]
//                                     W[b, o, i, u, v]
// where the divisions leave no remainder; an x that the branches share gets the sum over j. Every
// element is summed by one thread in an order that does not depend on the number of threads.

#include "cpu/branch_conv2d_kernels.h"
#include "cpu/branch_conv2d_rows.h"
#include "cpu/branch_conv2d_schedule.h"
#include "cpu/conv_plans.h"
#include "cpu/nested_conv2d_types.h"

namespace pyeff::cpu::PYEFF_ISA {

void branch_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& index, const TensorView& grad_weight,
                               const TensorView* grad_bias, const BranchConv2d& conv);
void combine_forward(const TensorView& y, const TensorView& projection, const TensorView* packed,
                     const TensorView* bias, const TensorView& index,
                     const TensorView& route_weight, const TensorView& out, int threads);
void combine_grad_input(const TensorView& grad_out, const TensorView& y,
                        const TensorView& projection, const TensorView& index,
                        const TensorView& route_weight, const TensorView* grad_y,
                        const TensorView* grad_route_weight, int threads);
void combine_grad_projection(const TensorView& grad_out, const TensorView& y,
                             const TensorView& index, const TensorView& route_weight,
                             const TensorView& grad_projection, int threads);

namespace {

// Calls f with the object that convolves the maps of one call.
template <typename T, typename D, typename F>
void with_conv(const PairMaps<const T>& source, const PairMaps<D>& dest, const Plan& plan,
               const BranchLayout& layout, const T* bias, const F& f) {
  const T* no_scale = nullptr;
  if (layout.depthwise) {
    f(MapConv<DepthwiseTile, T, D>(source, dest, plan, layout, bias));
  } else if (RowConv<T, D>::suits(plan, layout, source.map)) {
    f(RowConv<T, D>(source, dest, plan, layout, bias, no_scale));
  } else {
    f(MapConv<DenseTile, T, D>(source, dest, plan, layout, bias));
  }
}

template <typename T>
void forward(const TensorView& x_view, const TensorView& weight_view, const TensorView* packed_view,
             const TensorView* bias_view, const TensorView& index, const TensorView& y_view,
             const BranchConv2d& conv) {
  using A = Accumulator<T>;
  const Routes routes = routes_of(index, weight_view.shape[0]);
  const auto x = maps_of<const T>(x_view, routes.k);
  const auto y = maps_of<T>(y_view, routes.k);
  if (routes.pairs() == 0 || y.map.rows * y.map.cols == 0) return;
  const auto weights = BranchWeights<T>::forward(weight_view, conv.groups);
  const A* packed = packed_view == nullptr ? nullptr : packed_view->as<const A>();
  const T* bias = bias_view == nullptr ? nullptr : bias_view->as<const T>();
  const Plan& plan =
      forward_plan(weight_view.shape[3], weight_view.shape[4], conv.window, y.map.rows, y.map.cols);
  with_conv(x, y, plan, weights.layout(), bias, [&](const auto& one) {
    run_by_pair(one, y, routes, x.shared, weights, packed, conv.threads);
  });
}

// Sums in the accumulator's type, of as many images as fit the cache, when T is a smaller one.
template <typename T>
class SharedGradInput {
 public:
  using A = Accumulator<T>;

  SharedGradInput(const PairMaps<T>& grad_x, const Routes& routes, const BranchWeights<T>& weights)
      : grad_x_(grad_x), routes_(routes), weights_(weights) {
    if constexpr (std::is_same_v<T, A>) {
      sums_ = grad_x;
      chunk_ = routes.n;
    } else {
      sums_ = grad_x_as_sums();
      constexpr Index kSumBytes = 1024 * 1024;
      chunk_ = larger(kSumBytes / larger(sums_.map.n_stride * Index{sizeof(A)}, 1), 1);
    }
  }

  const PairMaps<A>& sums() const { return sums_; }

  template <typename Conv>
  void run(const Conv& conv, int threads) const {
    const Index panels = weights_.layout().panel_count();
    threads = useful_threads(threads, conv.multiply_adds() * double(routes_.pairs()));
    parallel(threads, [&](int thread, int of) {
      for_maps(part_of(routes_.n * panels, thread, of), panels, [&](Part images, Part part) {
        for (Index n = images.begin; n < images.end; n += chunk_) {
          run_chunk(conv, {n, smaller(n + chunk_, images.end)}, part);
        }
      });
    });
  }

 private:
  PairMaps<A> grad_x_as_sums() const {
    const auto& map = grad_x_.map;
    const Index row = map.cols * map.channels;
    return {{nullptr, map.n, map.rows, map.cols, map.channels, map.rows * row, row, map.channels},
            grad_x_.k,
            0,
            true};
  }

  template <typename Conv>
  void run_chunk(const Conv& conv, Part images, Part panels) const {
    const A* no_packed = nullptr;
    PairMaps<A> sums = sums_;
    if constexpr (!std::is_same_v<T, A>) {
      static thread_local Scratch scratch;
      sums.map.data = scratch.get<A>((images.end - images.begin) * sums.map.n_stride);
      sums.first_image = images.begin;
    }
    run_images(conv, sums, routes_, images, panels, weights_, no_packed, false);
    if constexpr (!std::is_same_v<T, A>) {
      for (Index n = images.begin; n < images.end; ++n) write_image(sums, n, panels);
    }
  }

  void write_image(const PairMaps<A>& sums, Index n, Part panels) const {
    const PanelChannels last = panel_channels(weights_.layout(), panels.end - 1);
    const Index begin = panel_channels(weights_.layout(), panels.begin).dest;
    const Index end = last.dest + last.lanes;
    const Image<T>& to = grad_x_.map;
    const A* from = sums.map.data + (n - sums.first_image) * sums.map.n_stride;
    for (Index r = 0; r < to.rows; ++r) {
      T* row = to.data + n * to.n_stride + r * to.row_stride;
      for (Index c = 0; c < to.cols; ++c, from += to.channels) {
        for (Index i = begin; i < end; ++i) narrow(from[i], row[c * to.col_stride + i]);
      }
    }
  }

  PairMaps<T> grad_x_;
  Routes routes_;
  const BranchWeights<T>& weights_;
  PairMaps<A> sums_{};
  Index chunk_ = 1;
};

template <typename T>
void grad_input(const TensorView& grad_y_view, const TensorView& weight_view,
                const TensorView& index, const TensorView& grad_x_view, const BranchConv2d& conv) {
  using A = Accumulator<T>;
  const Routes routes = routes_of(index, weight_view.shape[0]);
  const auto grad_y = maps_of<const T>(grad_y_view, routes.k);
  const auto grad_x = maps_of<T>(grad_x_view, routes.k);
  if (routes.pairs() == 0 || grad_x.map.rows * grad_x.map.cols == 0) return;
  const auto weights = BranchWeights<T>::transposed(weight_view, conv.groups);
  const Plan& plan = grad_input_plan(weight_view.shape[3], weight_view.shape[4], conv.window,
                                     grad_x.map.rows, grad_x.map.cols);
  const T* no_bias = nullptr;
  const A* no_packed = nullptr;
  if (!grad_x.shared) {
    with_conv(grad_y, grad_x, plan, weights.layout(), no_bias, [&](const auto& one) {
      run_by_pair(one, grad_x, routes, false, weights, no_packed, conv.threads);
    });
    return;
  }
  const SharedGradInput<T> shared(grad_x, routes, weights);
  with_conv(grad_y, shared.sums(), plan, weights.layout(), no_bias,
            [&](const auto& one) { shared.run(one, conv.threads); });
}

template <typename T>
void pack(const TensorView& weight, const TensorView& packed_view, Index groups, int threads) {
  using A = Accumulator<T>;
  const auto weights = BranchWeights<T>::forward(weight, groups);
  A* packed = packed_view.as<A>();
  const Index elements = weights.layout().elements();
  threads = useful_threads(threads, double(weights.branches() * elements));
  parallel(threads, [&](int thread, int of) {
    const Part part = part_of(weights.branches(), thread, of);
    for (Index b = part.begin; b < part.end; ++b) weights.pack(b, packed + b * elements);
  });
}

void branch_conv2d_pack(const TensorView& weight, const TensorView& packed, Index groups,
                        int threads) {
  for_dtype(weight.dtype, [&](auto t) { pack<decltype(t)>(weight, packed, groups, threads); });
}

void branch_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* packed,
                           const TensorView* bias, const TensorView& index, const TensorView& y,
                           const BranchConv2d& conv) {
  for_dtype(x.dtype,
            [&](auto t) { forward<decltype(t)>(x, weight, packed, bias, index, y, conv); });
}

void branch_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& index, const TensorView& grad_x,
                              const BranchConv2d& conv) {
  for_dtype(grad_y.dtype,
            [&](auto t) { grad_input<decltype(t)>(grad_y, weight, index, grad_x, conv); });
}

}  // namespace

extern const BranchKernels branch_kernels{&branch_conv2d_pack,       &branch_conv2d_forward,
                                          &branch_conv2d_grad_input, &branch_conv2d_grad_weight,
                                          &combine_forward,          &combine_grad_input,
                                          &combine_grad_projection};

}  // namespace pyeff::cpu::PYEFF_ISA
