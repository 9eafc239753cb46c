// branch_conv2d, gradients of weight and bias.

#include "cpu/branch_conv2d_grad_weight.h"

#include "cpu/branch_conv2d_kernels.h"
#include "cpu/nested_conv2d_types.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Depth-wise: gW[b, c, u, v] = sum gy[n, j, c, h, w] x[n, (j,) c, ...]. A unit is a panel of
// channels of one branch.
template <typename T>
class DepthwiseGradWeight {
 public:
  using A = Accumulator<T>;

  DepthwiseGradWeight(const PairMaps<const T>& grad_y, const PairMaps<const T>& x,
                      const TensorView& shape, const ConvWindow& window, T* to)
      : grad_y_(grad_y),
        x_(x),
        window_(window),
        to_(to),
        branches_(shape.shape[0]),
        channels_(shape.shape[1]),
        kernel_h_(shape.shape[3]),
        kernel_w_(shape.shape[4]) {
    band_rows_ = (grad_y.map.rows - 1) * window.stride_h + (kernel_h_ - 1) * window.dilation_h + 1;
    band_cols_ = (grad_y.map.cols - 1) * window.stride_w + (kernel_w_ - 1) * window.dilation_w + 1;
  }

  void run(const Routes& routes, int threads) const {
    VisitList& visits = thread_visits();
    visits.by_branch(routes, {0, routes.pairs()});
    const Index panels = ceil_div(channels_, kPanel), taps = kernel_h_ * kernel_w_;
    threads = useful_threads(threads, double(routes.pairs()) * double(channels_ * taps) *
                                          double(grad_y_.map.rows * grad_y_.map.cols));
    parallel(threads, [&](int thread, int of) {
      UnitSplit split(visits, branches_, panels, thread, of);
      for (Index b = 0; b < branches_; ++b) {
        const Part units = split.next(b), mine = visits.of_branch(b);
        for (Index p = units.begin; p < units.end; ++p) {
          run_panel(b, p * kPanel, visits.data() + mine.begin, mine.end - mine.begin);
        }
      }
    });
  }

 private:
  void run_panel(Index branch, Index channel, const Visit* visits, Index count) const {
    const Index taps = kernel_h_ * kernel_w_, lanes = smaller(kPanel, channels_ - channel);
    GradWeightScratch& scratch = grad_weight_scratch();
    A* sums = scratch.sums.template get<A>(taps * kPanel);
    A* x = scratch.x.template get<A>(band_rows_ * band_cols_ * kPanel);
    A* gy = scratch.grad_y.template get<A>(grad_y_.map.rows * grad_y_.map.cols * kPanel);
    std::memset(sums, 0, static_cast<std::size_t>(taps * kPanel) * sizeof(A));
    for (Index i = 0; i < count; ++i) {
      copy(x_, visits[i].pair, channel, lanes, -window_.pad_top, -window_.pad_left,
           {band_rows_, band_cols_}, x);
      copy(grad_y_, visits[i].pair, channel, lanes, 0, 0, {grad_y_.map.rows, grad_y_.map.cols}, gy);
      add_pair(x, gy, lanes, sums);
    }
    T* to = to_ + (branch * channels_ + channel) * taps;
    for (Index l = 0; l < lanes; ++l) {
      for (Index t = 0; t < taps; ++t) narrow(sums[t * kPanel + l], to[l * taps + t]);
    }
  }

  struct Size {
    Index rows, cols;
  };
  static void copy(const PairMaps<const T>& maps, Index pair, Index channel, Index lanes, Index row,
                   Index col, Size size, A* to) {
    Image<const T> map = maps.map;
    map.data += maps.offset(pair);
    copy_band<T, A>(map, 0, row, size.rows, col, size.cols, channel, lanes, kPanel, to);
  }

  void add_pair(const A* x, const A* gy, Index lanes, A* sums) const {
    for (Index u = 0; u < kernel_h_; ++u) {
      for (Index v = 0; v < kernel_w_; ++v, sums += kPanel) {
        const A* from = x + (u * window_.dilation_h * band_cols_ + v * window_.dilation_w) * kPanel;
        for (Index l = 0; l < lanes; l += kLanes<A>) add_tap(from + l, gy + l, sums + l);
      }
    }
  }

  void add_tap(const A* x, const A* gy, A* sums) const {
    constexpr int kChains = 4;  // independent sums, to hide the latency of the addition
    const Index x_step = window_.stride_w * kPanel, cols = grad_y_.map.cols;
    Vec<A> sum[kChains] = {};
    for (Index r = 0; r < grad_y_.map.rows; ++r) {
      const A* row = x + r * window_.stride_h * band_cols_ * kPanel;
      Index c = 0;
      for (; c + kChains <= cols; c += kChains, gy += kChains * kPanel) {
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) {
          sum[i] += load(row + (c + i) * x_step) * load(gy + i * kPanel);
        }
      }
      for (; c < cols; ++c, gy += kPanel) sum[0] += load(row + c * x_step) * load(gy);
    }
    store(sums, load(sums) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }

  PairMaps<const T> grad_y_, x_;
  ConvWindow window_;
  T* to_;
  Index branches_, channels_, kernel_h_, kernel_w_;
  Index band_rows_, band_cols_;
};

// gb[b, o] = sum of gy[n, j, o, h, w] over the pixels of the pairs of branch b. Threads own
// branches.
template <typename T>
void grad_bias(const PairMaps<const T>& grad_y, const Routes& routes, T* to, int threads) {
  using A = Accumulator<T>;
  const Image<const T>& map = grad_y.map;
  VisitList& visits = thread_visits();
  visits.by_branch(routes, {0, routes.pairs()});
  const double elements = double(routes.pairs()) * double(map.rows * map.cols * map.channels);
  parallel(useful_threads(threads, elements), [&](int thread, int of) {
    A* sums = grad_weight_scratch().sums.template get<A>(map.channels);
    UnitSplit split(visits, routes.branches, 1, thread, of);
    for (Index b = 0; b < routes.branches; ++b) {
      const Part units = split.next(b), mine = visits.of_branch(b);
      if (units.begin == units.end) continue;
      for (Index o = 0; o < map.channels; ++o) sums[o] = A(0);
      for (Index i = mine.begin; i < mine.end; ++i) {
        const T* from = map.data + grad_y.offset(visits.data()[i].pair);
        for (Index r = 0; r < map.rows; ++r) {
          for (Index c = 0; c < map.cols; ++c) {
            const T* pixel = from + r * map.row_stride + c * map.col_stride;
            for (Index o = 0; o < map.channels; ++o) sums[o] += widen(pixel[o]);
          }
        }
      }
      for (Index o = 0; o < map.channels; ++o) narrow(sums[o], to[b * map.channels + o]);
    }
  });
}

template <typename T>
void grad_weight(const TensorView& grad_y_view, const TensorView& x_view, const TensorView& index,
                 const TensorView& grad_weight_view, const TensorView* grad_bias_view,
                 const BranchConv2d& conv) {
  const Routes routes = routes_of(index, grad_weight_view.shape[0]);
  const auto grad_y = maps_of<const T>(grad_y_view, routes.k);
  const auto x = maps_of<const T>(x_view, routes.k);
  T* to = grad_weight_view.as<T>();
  if (grad_bias_view != nullptr) {
    grad_bias<T>(grad_y, routes, grad_bias_view->as<T>(), conv.threads);
  }
  if (forward_layout(grad_weight_view, conv.groups).depthwise) {
    DepthwiseGradWeight<T>(grad_y, x, grad_weight_view, conv.window, to).run(routes, conv.threads);
    return;
  }
  const T* no_scale = nullptr;
  BranchGradWeight<T>(grad_y, x, no_scale, grad_weight_view, conv.groups, conv.window, to)
      .run(routes, conv.threads);
}

}  // namespace

void branch_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& index, const TensorView& grad_weight_view,
                               const TensorView* grad_bias_view, const BranchConv2d& conv) {
  for_dtype(x.dtype, [&](auto t) {
    grad_weight<decltype(t)>(grad_y, x, index, grad_weight_view, grad_bias_view, conv);
  });
}

}  // namespace pyeff::cpu::PYEFF_ISA
