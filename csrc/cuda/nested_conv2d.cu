// The forward of nested_conv2d and the gradient of its input: one implicit product each, pixels by
// channels. Channels of the weight are read where they lie.

#include <algorithm>
#include <numeric>

#include "cuda/launch.cuh"
#include "cuda/nested_conv2d_tile.cuh"

namespace pyeff::cuda {

namespace {

Axis forward_axis(std::int64_t kernel, std::int64_t stride, std::int64_t pad,
                  std::int64_t dilation) {
  return {static_cast<int>(kernel), 1, stride, pad, dilation, true, 1};
}

Axis grad_axis(std::int64_t size, std::int64_t kernel, std::int64_t stride, std::int64_t pad,
               std::int64_t dilation) {
  return {static_cast<int>(kernel),
          static_cast<int>(std::min(size, stride)),
          stride,
          pad,
          dilation,
          false,
          static_cast<int>(stride / std::gcd(stride, dilation))};
}

template <typename T>
struct Problem {
  Map<const T> x;
  Map<T> y;
  Weight<const T> weight;
  const T* bias;   // [O] or null
  acc_t<T>* sums;  // [shares, N, H', W', channels of y] or null
  Axis vertical, horizontal;
  int class_h, class_w;  // results of a class
  int groups, shares;
};

// The part of the weight that one step multiplies with, as lines of outputs along inputs.
template <int kThreads, typename Panel, typename T>
__device__ __forceinline__ void fill_weight(T* panel, const Weight<const T>& weight, int group,
                                            int first_out, int first_in, int u, int v) {
  const T* const tap = weight.data + u * weight.row + v * weight.col;
  fill_lines<kThreads, Panel>(
      panel, weight.ins.count - first_in, weight.vector, weight.data, [&](int line) {
        const int selected = first_out + line;
        std::int64_t out = -1;
        if (selected < weight.outs.count) {
          out = weight.outs.channel(std::int64_t{group} * weight.outs.count + selected);
        }
        return [=, &weight](int at) -> const T* {
          const std::int64_t in = weight.ins.channel(first_in + at);
          return out < 0 || in < 0 ? nullptr : tap + out * weight.out + in * weight.in;
        };
      });
}

// kCols channels of the result by kDepth inputs; in the gradient of the input, whose depth is the
// weight's outputs, the other way round.
template <typename Tile, bool kForward>
using WeightPanel =
    std::conditional_t<kForward, RowPanel<Tile, Tile::kCols>, DepthPanel<Tile, Tile::kCols>>;
template <typename Tile, bool kForward>
constexpr int kStageElements =
    RowPanel<Tile, Tile::kRows>::kElements + WeightPanel<Tile, kForward>::kElements;

// y[n, o, i, j] = bias[o] + sum over taps and c of x[n, c, source] weight[o, c, tap] for the pixels
// of one class and the channels of one group; channels o of x and y change places in the gradient
// of the input. A block owns kRows pixels by kCols channels, of one share of the sum. The order of
// the terms is fixed: the same on every run.
template <typename Tile, bool kForward>
__global__ void __launch_bounds__(Tile::kThreads)
    nested_conv2d_kernel(const __grid_constant__ Problem<typename Tile::Value> p) {
  using T = typename Tile::Value;
  using Pixels = RowPanel<Tile, Tile::kRows>;
  using Weights = WeightPanel<Tile, kForward>;
  const Side& from = kForward ? p.weight.ins : p.weight.outs;
  const Side& to = kForward ? p.weight.outs : p.weight.ins;

  // Blocks that read the same pixels follow each other.
  unsigned rest = blockIdx.x;
  const auto next = [&](int count) {
    const int value = static_cast<int>(rest % static_cast<unsigned>(count));
    rest /= static_cast<unsigned>(count);
    return value;
  };
  const int first_col = next((to.count + Tile::kCols - 1) / Tile::kCols) * Tile::kCols;
  const int group = next(p.groups), share = next(p.shares);
  const int class_x = next(p.horizontal.classes), class_y = next(p.vertical.classes);
  const int first_row = static_cast<int>(rest) * Tile::kRows;
  const Taps down(p.vertical, class_y), across(p.horizontal, class_x);

  // A thread's lines of pixels are the same in every step.
  constexpr int kPerLine = Tile::kDepth * static_cast<int>(sizeof(T)) / 16;
  constexpr int kOwnLines = Tile::kRows * kPerLine / Tile::kThreads;
  const int plane = p.class_h * p.class_w, rows = p.x.images * plane;
  std::int64_t line_h[kOwnLines], line_w[kOwnLines];
  const T* line_image[kOwnLines];
#pragma unroll
  for (int i = 0; i < kOwnLines; ++i) {
    const int row = first_row + (i * Tile::kThreads + static_cast<int>(threadIdx.x)) / kPerLine;
    const int n = row / plane, pixel = row - n * plane, r = pixel / p.class_w;
    line_image[i] =
        row < rows ? p.x.data + n * p.x.image + std::int64_t{group} * from.count : nullptr;
    line_h[i] = r * down.spread + down.base;
    line_w[i] = (pixel - r * p.class_w) * across.spread + across.base;
  }

  const int chunks = (from.count + Tile::kDepth - 1) / Tile::kDepth;
  const int steps = down.count * across.count * chunks;
  const int per_share = (steps + p.shares - 1) / p.shares, first_step = share * per_share;
  const int own_steps = max(0, min(per_share, steps - first_step));

  Tile tile;
  tile.clear();
  run_stages<kNestedStages>(
      shared_memory<T>(), kStageElements<Tile, kForward>, own_steps,
      [&](int step, T* to) {
        step += first_step;
        const int tap = step / chunks, first_k = (step - tap * chunks) * Tile::kDepth;
        const int tap_u = tap / across.count, tap_v = tap - tap_u * across.count;
        const std::int64_t shift_h = tap_u * down.delta, shift_w = tap_v * across.delta;
        int own = 0;  // fill_lines asks for a thread's lines in their order
        fill_lines<Tile::kThreads, Pixels>(
            to, from.count - first_k, p.x.vector, p.x.data, [&](int) {
              const std::int64_t h = line_h[own] + shift_h, w = line_w[own] + shift_w;
              const bool inside =
                  line_image[own] != nullptr && h >= 0 && h < p.x.height && w >= 0 && w < p.x.width;
              const T* const pixel =
                  inside ? line_image[own] + h * p.x.row + w * p.x.pixel + first_k : nullptr;
              ++own;
              return [=](int at) { return pixel == nullptr ? nullptr : pixel + at; };
            });
        const int u = down.first + tap_u * down.step, v = across.first + tap_v * across.step;
        fill_weight<Tile::kThreads, Weights>(to + Pixels::kElements, p.weight, group,
                                             kForward ? first_col : first_k,
                                             kForward ? first_k : first_col, u, v);
      },
      [&](int, const T* at) {
        const T* const weights = at + Pixels::kElements;
        if constexpr (kForward) {
          tile.multiply(ByRow{at, Pixels::kPitch}, ByRow{weights, Weights::kPitch});
        } else {
          tile.multiply(ByRow{at, Pixels::kPitch}, ByDepth{weights, Weights::kPitch});
        }
      });

  const int channels = p.groups * to.count;
  tile.each([&](int tile_row, int tile_col, const auto& sums) {
    const int row = first_row + tile_row;
    if (row >= rows) return;
    const int n = row / plane, pixel = row - n * plane, r = pixel / p.class_w;
    const std::int64_t h = r * down.gap + class_y;
    const std::int64_t w = (pixel - r * p.class_w) * across.gap + class_x;
    if (h >= p.y.height || w >= p.y.width) return;
    const std::int64_t place =
        ((std::int64_t{share} * p.y.images + n) * p.y.height + h) * p.y.width + w;
    T* const y = p.y.at(n, static_cast<int>(h), static_cast<int>(w));
#pragma unroll
    for (int e = 0; e < Tile::kRun; ++e) {
      const int col = first_col + tile_col + e, channel = group * to.count + col;
      if (col >= to.count) return;
      acc_t<T> value = sums[e];
      if (p.sums != nullptr) {
        p.sums[place * channels + channel] = value;
        continue;
      }
      if (kForward && p.bias != nullptr) {
        const std::int64_t out = to.channel(channel);
        if (out >= 0) value += static_cast<acc_t<T>>(p.bias[out]);
      }
      y[channel] = static_cast<T>(value);
    }
  });
}

// y = bias + the sum over the shares, in their order; a thread owns one number.
template <typename T>
__global__ void __launch_bounds__(256)
    nested_conv2d_sum_kernel(const __grid_constant__ Problem<T> p, const Side to, int channels) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t pixels = std::int64_t{p.y.images} * p.y.height * p.y.width;
  if (i >= pixels * channels) return;
  const std::int64_t pixel = i / channels;
  const int channel = static_cast<int>(i - pixel * channels);
  acc_t<T> sum = 0;
  for (int share = 0; share < p.shares; ++share) sum += p.sums[share * pixels * channels + i];
  if (p.bias != nullptr) {
    const std::int64_t out = to.channel(channel);
    if (out >= 0) sum += static_cast<acc_t<T>>(p.bias[out]);
  }
  const std::int64_t rows = pixel / p.y.width;
  const int n = static_cast<int>(rows / p.y.height);
  p.y.at(n, static_cast<int>(rows - std::int64_t{n} * p.y.height),
         static_cast<int>(pixel - rows * p.y.width))[channel] = static_cast<T>(sum);
}

template <typename Tile, bool kForward>
void run(const char* name, const Problem<typename Tile::Value>& p, void* stream) {
  using T = typename Tile::Value;
  const Side& to = kForward ? p.weight.outs : p.weight.ins;
  const std::int64_t pixels = std::int64_t{p.x.images} * p.class_h * p.class_w;
  const std::int64_t blocks = (pixels + Tile::kRows - 1) / Tile::kRows *
                              ceil_div(to.count, Tile::kCols) * p.groups * p.shares *
                              p.vertical.classes * p.horizontal.classes;
  launch(name, nested_conv2d_kernel<Tile, kForward>, dim3(static_cast<unsigned>(blocks)),
         dim3(Tile::kThreads), kNestedStages * kStageElements<Tile, kForward> * sizeof(T), stream,
         p);
  if (p.sums == nullptr) return;
  const int channels = p.groups * to.count;
  const std::int64_t numbers = std::int64_t{p.y.images} * p.y.height * p.y.width * channels;
  launch("nested_conv2d_sum", nested_conv2d_sum_kernel<T>,
         dim3(static_cast<unsigned>((numbers + 255) / 256)), dim3(256), 0, stream, p, to, channels);
}

template <bool kForward>
void convolve(const char* name, const TensorView& x, const TensorView& weight,
              const TensorView* bias, const TensorView& y, const TensorView* workspace,
              const NestedConv2d& conv, const NestedConv2dPlan& plan, void* stream) {
  if (y.shape[0] * y.shape[1] * y.shape[2] * y.shape[3] == 0) return;
  const DeviceGuard guard(y.device_index);
  if (is_depthwise(weight, conv)) {
    return depthwise_conv2d(name, x, weight, bias, y, conv, kForward, stream);
  }
  const ConvWindow& window = conv.window;
  const int groups = active_groups(weight, conv);
  const auto axis = [&](int d, std::int64_t stride, std::int64_t pad, std::int64_t dilation) {
    return kForward ? forward_axis(weight.shape[d], stride, pad, dilation)
                    : grad_axis(y.shape[d], weight.shape[d], stride, pad, dilation);
  };
  dispatch(name, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    Problem<T> p{map_of<const T>(x, x.shape[1] / groups),
                 map_of<T>(y, y.shape[1] / groups),
                 weight_of<const T>(weight, conv, groups),
                 bias == nullptr ? nullptr : bias->as<const T>(),
                 workspace == nullptr ? nullptr : workspace->as<acc_t<T>>(),
                 axis(2, window.stride_h, window.pad_top, window.dilation_h),
                 axis(3, window.stride_w, window.pad_left, window.dilation_w),
                 0,
                 0,
                 groups,
                 static_cast<int>(plan.shares)};
    p.class_h = ceil_div(p.y.height, p.vertical.classes);
    p.class_w = ceil_div(p.y.width, p.horizontal.classes);
    with_nested_tile<T>(
        plan, [&](auto type) { run<typename decltype(type)::type, kForward>(name, p, stream); });
  });
}

}  // namespace

void nested_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* bias,
                           const TensorView& y, const TensorView* workspace,
                           const NestedConv2d& conv, const NestedConv2dPlan& plan, void* stream) {
  convolve<true>("nested_conv2d", x, weight, bias, y, workspace, conv, plan, stream);
}

void nested_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& grad_x, const TensorView* workspace,
                              const NestedConv2d& conv, const NestedConv2dPlan& plan,
                              void* stream) {
  convolve<false>("nested_conv2d_grad_input", grad_y, weight, nullptr, grad_x, workspace, conv,
                  plan, stream);
}

}  // namespace pyeff::cuda
