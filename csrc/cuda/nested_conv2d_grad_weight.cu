// The gradient of nested_conv2d's weight: a product over pixels for every tap, written to the
// selected channels of the full gradient. The rest of it is not touched.

#include "cuda/launch.cuh"
#include "cuda/nested_conv2d_tile.cuh"

namespace pyeff::cuda {
namespace {

template <typename T>
struct Problem {
  Map<const T> grad_y, x;
  Weight<T> weight;  // the gradient
  acc_t<T>* sums;    // [shares, o, kh, kw, i] or null
  ConvWindow window;
  int kernel_h, kernel_w, groups, shares;
};

// Writes one number of the gradient; o counts over all groups, i within one.
template <typename T>
__device__ void write(const Weight<T>& weight, int o, int i, int u, int v, acc_t<T> sum) {
  const std::int64_t out = weight.outs.channel(o), in = weight.ins.channel(i);
  if (out < 0 || in < 0) return;
  weight.data[out * weight.out + in * weight.in + u * weight.row + v * weight.col] =
      static_cast<T>(sum);
}

template <typename Tile>
constexpr int kStageElements =
    DepthPanel<Tile, Tile::kRows>::kElements + DepthPanel<Tile, Tile::kCols>::kElements;

// grad[o, i, u, v] = sum over n, p, q of grad_y[n, o, p, q] x[n, i, h, w] with h = p stride - pad +
// u dilation and w likewise. A block owns kRows outputs by kCols inputs of one tap and one share of
// the pixels. The order of the terms is fixed: the same on every run.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    nested_conv2d_grad_weight_kernel(const __grid_constant__ Problem<typename Tile::Value> p) {
  using T = typename Tile::Value;
  using Gradients = DepthPanel<Tile, Tile::kRows>;
  using Pixels = DepthPanel<Tile, Tile::kCols>;
  unsigned rest = blockIdx.x;
  const auto next = [&](int count) {
    const int value = static_cast<int>(rest % static_cast<unsigned>(count));
    rest /= static_cast<unsigned>(count);
    return value;
  };
  const int outs = p.weight.outs.count, ins = p.weight.ins.count;
  const int first_in = next((ins + Tile::kCols - 1) / Tile::kCols) * Tile::kCols;
  const int first_out = next((outs + Tile::kRows - 1) / Tile::kRows) * Tile::kRows;
  const int v = next(p.kernel_w), u = next(p.kernel_h), group = next(p.groups);
  const int share = static_cast<int>(rest);

  const int plane = p.grad_y.height * p.grad_y.width, pixels = p.grad_y.images * plane;
  const int all_steps = (pixels + Tile::kDepth - 1) / Tile::kDepth;
  const int per_share = (all_steps + p.shares - 1) / p.shares, first_step = share * per_share;
  const std::int64_t shift_h = u * p.window.dilation_h - p.window.pad_top;
  const std::int64_t shift_w = v * p.window.dilation_w - p.window.pad_left;

  Tile tile;
  tile.clear();
  run_stages<kNestedStages>(
      shared_memory<T>(), kStageElements<Tile>, max(0, min(per_share, all_steps - first_step)),
      [&](int step, T* to) {
        const int first = (first_step + step) * Tile::kDepth;
        fill_lines<Tile::kThreads, Gradients>(
            to, outs - first_out, p.grad_y.vector, p.grad_y.data, [&](int line) {
              const int k = first + line, n = k / plane, r = (k - n * plane) / p.grad_y.width;
              const int c = k - n * plane - r * p.grad_y.width;
              const T* const pixel =
                  k < pixels ? p.grad_y.at(n, r, c) + std::int64_t{group} * outs + first_out
                             : nullptr;
              return [=](int at) { return pixel == nullptr ? nullptr : pixel + at; };
            });
        fill_lines<Tile::kThreads, Pixels>(
            to + Gradients::kElements, ins - first_in, p.x.vector, p.x.data, [&](int line) {
              const int k = first + line, n = k / plane, r = (k - n * plane) / p.grad_y.width;
              const int c = k - n * plane - r * p.grad_y.width;
              const std::int64_t h = r * p.window.stride_h + shift_h;
              const std::int64_t w = c * p.window.stride_w + shift_w;
              const bool inside = k < pixels && h >= 0 && h < p.x.height && w >= 0 && w < p.x.width;
              const T* const pixel = inside ? p.x.at(n, static_cast<int>(h), static_cast<int>(w)) +
                                                  std::int64_t{group} * ins + first_in
                                            : nullptr;
              return [=](int at) { return pixel == nullptr ? nullptr : pixel + at; };
            });
      },
      [&](int, const T* at) {
        tile.multiply(ByDepth{at, Gradients::kPitch},
                      ByDepth{at + Gradients::kElements, Pixels::kPitch});
      });

  const int taps = p.kernel_h * p.kernel_w, tap = u * p.kernel_w + v;
  tile.each([&](int row, int col, const auto& sums) {
    const int o = first_out + row, out = group * outs + o;
    if (o >= outs) return;
    const std::int64_t line = std::int64_t{share} * p.groups * outs + out;
#pragma unroll
    for (int e = 0; e < Tile::kRun; ++e) {
      const int in = first_in + col + e;
      if (in >= ins) return;
      if (p.sums == nullptr) {
        write(p.weight, out, in, u, v, sums[e]);
      } else {
        p.sums[(line * taps + tap) * ins + in] = sums[e];
      }
    }
  });
}

// A thread owns one number of the selected part.
template <typename T>
__global__ void __launch_bounds__(256)
    nested_conv2d_sum_weight_kernel(const acc_t<T>* sums,  // [shares, o, kh, kw, i]
                                    const Weight<T> weight, int outs, int kernel_h, int kernel_w,
                                    int shares) {
  const std::int64_t at = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int ins = weight.ins.count;
  const std::int64_t count = std::int64_t{outs} * kernel_h * kernel_w * ins;
  if (at >= count) return;
  acc_t<T> sum = 0;
  for (int share = 0; share < shares; ++share) sum += sums[share * count + at];
  const std::int64_t line = at / ins, row = line / kernel_w;
  write(weight, static_cast<int>(row / kernel_h), static_cast<int>(at - line * ins),
        static_cast<int>(row % kernel_h), static_cast<int>(line % kernel_w), sum);
}

template <typename Tile>
void run(const Problem<typename Tile::Value>& p, void* stream) {
  const std::int64_t blocks = std::int64_t{ceil_div(p.weight.ins.count, Tile::kCols)} *
                              ceil_div(p.weight.outs.count, Tile::kRows) * p.kernel_h * p.kernel_w *
                              p.groups * p.shares;
  launch("nested_conv2d_grad_weight", nested_conv2d_grad_weight_kernel<Tile>,
         dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads),
         kNestedStages * kStageElements<Tile> * sizeof(typename Tile::Value), stream, p);
}

}  // namespace

void sum_weight_shares(const TensorView& workspace, const TensorView& grad_weight,
                       const NestedConv2d& conv, std::int64_t shares, void* stream) {
  dispatch("nested_conv2d_grad_weight", grad_weight.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Weight<T> weight = weight_of<T>(grad_weight, conv, active_groups(grad_weight, conv));
    const std::int64_t kernel_h = grad_weight.shape[2], kernel_w = grad_weight.shape[3];
    const std::int64_t count = conv.out.count * kernel_h * kernel_w * weight.ins.count;
    launch("nested_conv2d_sum_weight", nested_conv2d_sum_weight_kernel<T>,
           dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), 0, stream,
           workspace.as<const acc_t<T>>(), weight, conv.out.count, kernel_h, kernel_w, shares);
  });
}

void nested_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& grad_weight, const TensorView* workspace,
                               const NestedConv2d& conv, const NestedConv2dPlan& plan,
                               void* stream) {
  if (conv.out.count == 0 || conv.in.count == 0) return;
  const DeviceGuard guard(grad_weight.device_index);
  if (is_depthwise(grad_weight, conv)) {
    return depthwise_grad_weight(grad_y, x, grad_weight, workspace, conv, plan, stream);
  }
  const int groups = active_groups(grad_weight, conv);
  dispatch("nested_conv2d_grad_weight", grad_weight.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p{map_of<const T>(grad_y, grad_y.shape[1] / groups),
                       map_of<const T>(x, x.shape[1] / groups),
                       weight_of<T>(grad_weight, conv, groups),
                       workspace == nullptr ? nullptr : workspace->as<acc_t<T>>(),
                       conv.window,
                       static_cast<int>(grad_weight.shape[2]),
                       static_cast<int>(grad_weight.shape[3]),
                       groups,
                       static_cast<int>(plan.shares)};
    with_nested_tile<T>(plan, [&](auto type) { run<typename decltype(type)::type>(p, stream); });
  });
  if (workspace != nullptr) {
    sum_weight_shares(*workspace, grad_weight, conv, plan.shares, stream);
  }
}

}  // namespace pyeff::cuda
