// nested_conv2d with one channel per group: every channel is a sum over its own taps, bound by
// what it reads.

#include "cuda/launch.cuh"
#include "cuda/nested_conv2d.cuh"
#include "cuda/warp.cuh"

namespace pyeff::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32, kSums = kThreads / kLanes;  // channels and sums of a block

template <typename T>
struct Problem {
  Map<const T> x;                  // what is read: x, or grad_y in the gradient of the input
  Map<T> y;                        // what is written
  const T* weight;                 // at the first selected channel
  std::int64_t channel, row, col;  // its strides
  const T* bias;                   // at the first selected channel, or null
  ConvWindow window;
  int kernel_h, kernel_w, channels;
};

template <typename T, int kVector>
struct alignas(kVector * sizeof(T)) Vector {
  T lane[kVector];
};

// Where a tap, `tap` pixels from the first, reads along one axis; negative where nothing lies.
template <bool kForward>
__device__ std::int64_t position(std::int64_t result, std::int64_t tap, std::int64_t stride,
                                 std::int64_t pad, int size) {
  const std::int64_t at = kForward ? result * stride - pad + tap : result + pad - tap;
  if constexpr (kForward) return at < size ? at : -1;
  // A position and a padding fit into 31 bits each.
  const unsigned whole = static_cast<unsigned>(at), step = static_cast<unsigned>(stride);
  if (at < 0 || whole % step != 0) return -1;
  const std::int64_t source = whole / step;
  return source < size ? source : -1;
}

// y[n, c, i, j] = bias[c] + sum over taps of x[n, c, source] weight[c, tap]. A thread owns kVector
// channels of one pixel. The same on every run.
template <typename T, int kVector, bool kForward>
__global__ void __launch_bounds__(kThreads)
    nested_conv2d_depthwise_kernel(const __grid_constant__ Problem<T> p) {
  using A = acc_t<T>;
  // Pixels are fewer than 2^31: divisions of 64 bits cost more than the sum.
  const unsigned pixel = blockIdx.x * blockDim.y + threadIdx.y;
  const int first = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kVector;
  const unsigned row = pixel / static_cast<unsigned>(p.y.width);
  const int n = static_cast<int>(row / static_cast<unsigned>(p.y.height));
  if (n >= p.y.images || first >= p.channels) return;
  const int i = static_cast<int>(row) - n * p.y.height;
  const int j = static_cast<int>(pixel - row * static_cast<unsigned>(p.y.width));
  A sum[kVector];
#pragma unroll
  for (int l = 0; l < kVector; ++l) {
    sum[l] = p.bias == nullptr ? A{0} : static_cast<A>(p.bias[first + l]);
  }
  for (int u = 0; u < p.kernel_h; ++u) {
    const std::int64_t h = position<kForward>(i, u * p.window.dilation_h, p.window.stride_h,
                                              p.window.pad_top, p.x.height);
    if (h < 0) continue;
    for (int v = 0; v < p.kernel_w; ++v) {
      const std::int64_t w = position<kForward>(j, v * p.window.dilation_w, p.window.stride_w,
                                                p.window.pad_left, p.x.width);
      if (w < 0) continue;
      const auto values = *reinterpret_cast<const Vector<T, kVector>*>(
          p.x.at(n, static_cast<int>(h), static_cast<int>(w)) + first);
      const T* const weight = p.weight + first * p.channel + u * p.row + v * p.col;
#pragma unroll
      for (int l = 0; l < kVector; ++l) {
        sum[l] += static_cast<A>(values.lane[l]) * static_cast<A>(weight[l * p.channel]);
      }
    }
  }
  Vector<T, kVector> result;
#pragma unroll
  for (int l = 0; l < kVector; ++l) result.lane[l] = static_cast<T>(sum[l]);
  *reinterpret_cast<Vector<T, kVector>*>(p.y.at(n, i, j) + first) = result;
}

template <typename T>
struct GradProblem {
  Map<const T> grad_y, x;
  T* grad;  // at the first selected channel
  std::int64_t channel, row, col;
  acc_t<T>* sums;  // [shares, channels, kh, kw] or null
  ConvWindow window;
  int kernel_h, kernel_w, channels, shares;
};

// grad[c, u, v] = sum over n, p, q of grad_y[n, c, p, q] x[n, c, h, w]. A block owns kLanes
// channels of one tap and one share of the pixels, of which every kSums-th goes to one of its sums;
// those are added in their order: the same on every run.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    nested_conv2d_depthwise_grad_weight_kernel(const __grid_constant__ GradProblem<T> p) {
  using A = acc_t<T>;
  A* const sums = shared_memory<A>();  // [kSums, kLanes]
  unsigned rest = blockIdx.x;
  const auto next = [&](int count) {
    const int value = static_cast<int>(rest % static_cast<unsigned>(count));
    rest /= static_cast<unsigned>(count);
    return value;
  };
  const int lane = threadIdx.x % kLanes, own = threadIdx.x / kLanes;
  const int c = next((p.channels + kLanes - 1) / kLanes) * kLanes + lane;
  const int v = next(p.kernel_w), u = next(p.kernel_h), share = static_cast<int>(rest);
  const int plane = p.grad_y.height * p.grad_y.width, pixels = p.grad_y.images * plane;
  const int per_share = (pixels + p.shares - 1) / p.shares;
  const std::int64_t first = std::int64_t{share} * per_share;
  const int end = static_cast<int>(min(first + per_share, std::int64_t{pixels}));
  A sum = 0;
  for (int k = static_cast<int>(min(first + own, std::int64_t{end})); k < end && c < p.channels;
       k += kSums) {
    const int n = k / plane, r = (k - n * plane) / p.grad_y.width;
    const int q = k - n * plane - r * p.grad_y.width;
    const std::int64_t h = r * p.window.stride_h - p.window.pad_top + u * p.window.dilation_h;
    const std::int64_t w = q * p.window.stride_w - p.window.pad_left + v * p.window.dilation_w;
    if (h < 0 || h >= p.x.height || w < 0 || w >= p.x.width) continue;
    sum += static_cast<A>(p.grad_y.at(n, r, q)[c]) *
           static_cast<A>(p.x.at(n, static_cast<int>(h), static_cast<int>(w))[c]);
  }
  sums[own * kLanes + lane] = sum;
  __syncthreads();
  if (own != 0 || c >= p.channels) return;
  for (int s = 1; s < kSums; ++s) sum += sums[s * kLanes + lane];
  if (p.sums != nullptr) {
    const std::int64_t line = std::int64_t{share} * p.channels + c;
    p.sums[(line * p.kernel_h + u) * p.kernel_w + v] = sum;
  } else {
    p.grad[c * p.channel + u * p.row + v * p.col] = static_cast<T>(sum);
  }
}

template <typename T, int kVector, bool kForward>
void run(const char* name, const Problem<T>& p, void* stream) {
  const int vectors = p.channels / kVector, columns = ceil_div(vectors, kThreads);
  const int across = ceil_div(vectors, columns), down = kThreads / across;
  const std::int64_t pixels = std::int64_t{p.y.images} * p.y.height * p.y.width;
  const dim3 grid(static_cast<unsigned>(ceil_div(pixels, down)), static_cast<unsigned>(columns));
  launch(name, nested_conv2d_depthwise_kernel<T, kVector, kForward>, grid,
         dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), 0, stream, p);
}

}  // namespace

void depthwise_conv2d(const char* name, const TensorView& x, const TensorView& weight,
                      const TensorView* bias, const TensorView& y, const NestedConv2d& conv,
                      bool forward, void* stream) {
  dispatch(name, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p{map_of<const T>(x, conv.out.count),
                       map_of<T>(y, conv.out.count),
                       weight.as<const T>() + conv.out.lo * weight.stride[0],
                       weight.stride[0],
                       weight.stride[2],
                       weight.stride[3],
                       bias == nullptr ? nullptr : bias->as<const T>() + conv.out.lo,
                       conv.window,
                       static_cast<int>(weight.shape[2]),
                       static_cast<int>(weight.shape[3]),
                       static_cast<int>(conv.out.count)};
    constexpr int kVector = 16 / sizeof(T);
    if (p.x.vector && p.y.vector) {
      forward ? run<T, kVector, true>(name, p, stream) : run<T, kVector, false>(name, p, stream);
    } else {
      forward ? run<T, 1, true>(name, p, stream) : run<T, 1, false>(name, p, stream);
    }
  });
}

void depthwise_grad_weight(const TensorView& grad_y, const TensorView& x,
                           const TensorView& grad_weight, const TensorView* workspace,
                           const NestedConv2d& conv, const NestedConv2dPlan& plan, void* stream) {
  constexpr const char* name = "nested_conv2d_grad_weight";
  dispatch(name, grad_weight.dtype, [&](auto zero) {
    using T = decltype(zero);
    const GradProblem<T> p{map_of<const T>(grad_y, conv.out.count),
                           map_of<const T>(x, conv.out.count),
                           grad_weight.as<T>() + conv.out.lo * grad_weight.stride[0],
                           grad_weight.stride[0],
                           grad_weight.stride[2],
                           grad_weight.stride[3],
                           workspace == nullptr ? nullptr : workspace->as<acc_t<T>>(),
                           conv.window,
                           static_cast<int>(grad_weight.shape[2]),
                           static_cast<int>(grad_weight.shape[3]),
                           static_cast<int>(conv.out.count),
                           static_cast<int>(plan.shares)};
    const std::int64_t blocks =
        std::int64_t{ceil_div(p.channels, kLanes)} * p.kernel_h * p.kernel_w * p.shares;
    launch(name, nested_conv2d_depthwise_grad_weight_kernel<T>, dim3(static_cast<unsigned>(blocks)),
           dim3(kThreads), kThreads * sizeof(acc_t<T>), stream, p);
  });
  if (workspace != nullptr) {
    sum_weight_shares(*workspace, grad_weight, conv, plan.shares, stream);
  }
}

}  // namespace pyeff::cuda
