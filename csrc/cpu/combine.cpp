// combine, forward and gradients: rows of the pairs of a branch times that branch's projection.
// A thread owns whole images where pairs are summed, and adds them in the order of their branches.

#include "cpu/branch_conv2d_grad_weight.h"
#include "cpu/branch_conv2d_kernels.h"
#include "cpu/branch_conv2d_rows.h"
#include "cpu/branch_conv2d_schedule.h"
#include "cpu/conv_plans.h"
#include "cpu/nested_conv2d_types.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

constexpr ConvWindow kPointwise{1, 1, 0, 0, 1, 1};

// A tensor of rows as maps of one pixel: [N, F] is [N, F, 1, 1] and [N, k, F] is [N, k, F, 1, 1];
// a projection [B, O, F] is a weight [B, O, F, 1, 1].
TensorView as_maps(const TensorView& rows) {
  TensorView maps = rows;
  maps.ndim += 2;
  maps.shape[rows.ndim] = maps.shape[rows.ndim + 1] = 1;
  maps.stride[rows.ndim] = maps.stride[rows.ndim + 1] = rows.shape[rows.ndim - 1];
  return maps;
}

template <typename T>
void forward(const TensorView& y_view, const TensorView& projection, const TensorView* packed_view,
             const TensorView* bias_view, const TensorView& index, const TensorView& route_weight,
             const TensorView& out_view, int threads) {
  using A = Accumulator<T>;
  const Routes routes = routes_of(index, projection.shape[0]);
  const auto y = maps_of<const T>(as_maps(y_view), routes.k);
  const auto out = maps_of<T>(as_maps(out_view), routes.k);
  const auto weights = BranchWeights<T>::forward(as_maps(projection), 1);
  const A* packed = packed_view == nullptr ? nullptr : packed_view->as<const A>();
  const T *bias = bias_view == nullptr ? nullptr : bias_view->as<const T>(), *no_bias = nullptr;
  const Index outputs = out.map.channels;
  const Plan& plan = forward_plan(1, 1, kPointwise, 1, 1);
  PairMaps<A> sums{
      {nullptr, routes.n, 1, 1, outputs, outputs, outputs, outputs}, routes.k, 0, true};
  const RowConv<T, A> conv(y, sums, plan, weights.layout(), no_bias, route_weight.as<const T>());
  threads = useful_threads(threads, conv.multiply_adds() * double(routes.pairs()));
  parallel(threads, [&](int thread, int of) {
    const Part images = part_of(routes.n, thread, of);
    static thread_local Scratch scratch;
    PairMaps<A> mine = sums;
    mine.first_image = images.begin;
    const Index elements = (images.end - images.begin) * outputs;
    mine.map.data = scratch.get<A>(elements);
    for (Index i = 0; i < elements; ++i) {
      mine.map.data[i] = bias == nullptr ? A(0) : widen(bias[i % outputs]);
    }
    run_images(conv, mine, routes, images, {0, weights.layout().panel_count()}, weights, packed,
               true);
    T* to = out.map.data + images.begin * outputs;
    for (Index i = 0; i < elements; ++i) narrow(mine.map.data[i], to[i]);
  });
}

// v = projection[b]^T grad_out[n] for the pairs of one branch at a time.
template <typename T>
class GradInput {
 public:
  using A = Accumulator<T>;

  GradInput(const PairMaps<const T>& grad_out, const PairMaps<const T>& y, const T* route_weight,
            T* grad_route_weight, const PairMaps<T>* grad_y, const BranchLayout& layout)
      : grad_out_(grad_out),
        y_(y),
        route_weight_(route_weight),
        grad_route_weight_(grad_route_weight),
        grad_y_(grad_y),
        layout_(layout) {}

  class Worker {
   public:
    explicit Worker(const GradInput& grad) : grad_(grad), product_(grad.layout_) {}

    void run(const Visit* visits, Index count, Part panels, const A* weights, Index branch_stride) {
      const Index features = grad_.layout_.lanes;
      static thread_local Scratch scratch;
      A* v = scratch.get<A>(count * features);
      const auto& grad_out = grad_.grad_out_;
      product_.run(
          count, panels, weights + visits[0].branch * branch_stride,
          [&](Index row, A* to) {
            widen_row(grad_out.map.data + grad_out.offset(visits[row].pair), to,
                      grad_out.map.channels);
          },
          [&](const PanelChannels&, A* init) {
            for (int l = 0; l < kPanel; ++l) init[l] = A(0);
          },
          [&](Index row, const PanelChannels& channels, const A* cells) {
            A* to = v + row * features + channels.dest;
            for (Index l = 0; l < channels.lanes; ++l) to[l] = cells[l];
          });
      for (Index i = 0; i < count; ++i) write(visits[i].pair, v + i * features);
    }

   private:
    void write(Index pair, const A* v) const {
      const Index features = grad_.layout_.lanes;
      if (grad_.grad_y_ != nullptr) {
        const A scale = widen(grad_.route_weight_[pair]);
        T* to = grad_.grad_y_->map.data + grad_.grad_y_->offset(pair);
        for (Index f = 0; f < features; ++f) narrow(scale * v[f], to[f]);
      }
      if (grad_.grad_route_weight_ == nullptr) return;
      const T* y = grad_.y_.map.data + grad_.y_.offset(pair);
      constexpr int kChains = 8;  // summed side by side, in an order that is always the same
      A sums[kChains] = {};
      Index f = 0;
      for (; f + kChains <= features; f += kChains) {
        for (int c = 0; c < kChains; ++c) sums[c] += v[f + c] * widen(y[f + c]);
      }
      for (; f < features; ++f) sums[0] += v[f] * widen(y[f]);
      A sum = A(0);
      for (int c = 0; c < kChains; ++c) sum += sums[c];
      narrow(sum, grad_.grad_route_weight_[pair]);
    }

    const GradInput& grad_;
    RowProduct<A> product_;
  };

 private:
  PairMaps<const T> grad_out_, y_;
  const T* route_weight_;
  T* grad_route_weight_;
  const PairMaps<T>* grad_y_;
  BranchLayout layout_;
};

template <typename T>
void grad_input(const TensorView& grad_out_view, const TensorView& y_view,
                const TensorView& projection, const TensorView& index,
                const TensorView& route_weight, const TensorView* grad_y_view,
                const TensorView* grad_route_weight, int threads) {
  using A = Accumulator<T>;
  const Routes routes = routes_of(index, projection.shape[0]);
  const auto grad_out = maps_of<const T>(as_maps(grad_out_view), routes.k);
  const auto y = maps_of<const T>(as_maps(y_view), routes.k);
  const auto weights = BranchWeights<T>::transposed(as_maps(projection), 1);
  PairMaps<T> grad_y{};
  if (grad_y_view != nullptr) grad_y = maps_of<T>(as_maps(*grad_y_view), routes.k);
  const GradInput<T> grad(grad_out, y, route_weight.as<const T>(),
                          grad_route_weight == nullptr ? nullptr : grad_route_weight->as<T>(),
                          grad_y_view == nullptr ? nullptr : &grad_y, weights.layout());
  VisitList& visits = thread_visits();
  visits.by_branch(routes, {0, routes.pairs()});
  const A* no_packed = nullptr;
  threads = useful_threads(threads, double(routes.pairs()) * double(weights.layout().elements()));
  parallel(threads, [&](int thread, int of) {
    using Worker = typename GradInput<T>::Worker;
    Worker worker(grad);
    BranchRunner<T, Worker> runner(worker, RowProduct<A>::max_rows(weights.layout()), weights,
                                   no_packed);
    const Part pairs = part_of(routes.pairs(), thread, of);
    runner.run(visits.data() + pairs.begin, pairs.end - pairs.begin,
               {0, weights.layout().panel_count()}, false);
  });
}

template <typename T>
void grad_projection(const TensorView& grad_out_view, const TensorView& y_view,
                     const TensorView& index, const TensorView& route_weight,
                     const TensorView& grad_view, int threads) {
  const Routes routes = routes_of(index, grad_view.shape[0]);
  const auto grad_out = maps_of<const T>(as_maps(grad_out_view), routes.k);
  const auto y = maps_of<const T>(as_maps(y_view), routes.k);
  BranchGradWeight<T>(grad_out, y, route_weight.as<const T>(), as_maps(grad_view), 1, kPointwise,
                      grad_view.as<T>())
      .run(routes, threads);
}

}  // namespace

void combine_forward(const TensorView& y, const TensorView& projection, const TensorView* packed,
                     const TensorView* bias, const TensorView& index,
                     const TensorView& route_weight, const TensorView& out, int threads) {
  for_dtype(y.dtype, [&](auto t) {
    forward<decltype(t)>(y, projection, packed, bias, index, route_weight, out, threads);
  });
}

void combine_grad_input(const TensorView& grad_out, const TensorView& y,
                        const TensorView& projection, const TensorView& index,
                        const TensorView& route_weight, const TensorView* grad_y,
                        const TensorView* grad_route_weight, int threads) {
  for_dtype(y.dtype, [&](auto t) {
    grad_input<decltype(t)>(grad_out, y, projection, index, route_weight, grad_y, grad_route_weight,
                            threads);
  });
}

void combine_grad_projection(const TensorView& grad_out, const TensorView& y,
                             const TensorView& index, const TensorView& route_weight,
                             const TensorView& grad, int threads) {
  for_dtype(y.dtype, [&](auto t) {
    grad_projection<decltype(t)>(grad_out, y, index, route_weight, grad, threads);
  });
}

}  // namespace pyeff::cpu::PYEFF_ISA
