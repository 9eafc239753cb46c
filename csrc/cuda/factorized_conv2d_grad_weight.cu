// Gradient of a 1-D convolution's weight in factorized_conv2d: a sum over all pixels, which blocks
// share. Every block writes the sum of its pixels to a workspace; a second kernel adds them up in
// their order, so that results repeat bit for bit.

#include <algorithm>

#include "cuda/factorized_conv2d.cuh"
#include "cuda/launch.cuh"

namespace pyeff::cuda {
namespace {

constexpr int kStages = 3;
// Two for each multiprocessor of an H100. A constant: the same sums on every device.
constexpr std::int64_t kBlocksWanted = 264;
constexpr int kLeastPanels = 8;  // of a block
constexpr int kAddThreads = 256;

template <typename T>
struct GradWeightProblem {
  LineMap<const T> grad_y, x;
  acc_t<T>* partial;  // [splits, O, taps, C]
  std::int64_t stride, padding, dilation;
  int pixels, taps, panels;  // panels of kDepth pixels for a block
  bool along_fast;

  __device__ void split(int m, std::int64_t& n, int& a, int& b) const {
    const int fast = along_fast ? grad_y.A : grad_y.B;
    const int image = grad_y.A * grad_y.B;
    const int within = m % image, slow = within / fast;
    n = m / image;
    a = along_fast ? within - slow * fast : slow;
    b = along_fast ? slow : within - slow * fast;
  }
};

// kDepth pixels of grad_y and the pixels of x that the tap takes them to, kRows and kCols channels.
template <typename Tile>
__device__ void load_pixels(typename Tile::Value* to,
                            const GradWeightProblem<typename Tile::Value>& p, int first, int tap,
                            int first_row, int first_col) {
  using T = typename Tile::Value;
  static_assert(Tile::kRows == Tile::kCols);
  constexpr int kChunk = 16 / sizeof(T), kChunks = Tile::kRows / kChunk;
  using Panel = DepthPanel<Tile, Tile::kRows>;
  for (int i = threadIdx.x; i < Tile::kDepth * kChunks; i += Tile::kThreads) {
    const int k = i / kChunks, at = i % kChunks * kChunk, m = first + k;
    const T *from_grad = nullptr, *from_x = nullptr;
    if (m < p.pixels) {
      std::int64_t n;
      int a, b;
      p.split(m, n, a, b);
      from_grad = p.grad_y.pixel(n, a, b);
      const std::int64_t a_x = a * p.stride - p.padding + tap * p.dilation;
      if (a_x >= 0 && a_x < p.x.A) from_x = p.x.pixel(n, a_x, b);
    }
    T* const to_grad = to + k * Panel::kPitch + at;
    load_chunk(to_grad, from_grad, p.grad_y.data, first_row + at, p.grad_y.channels, 1,
               p.grad_y.wide);
    load_chunk(to_grad + Panel::kElements, from_x, p.x.data, first_col + at, p.x.channels, 1,
               p.x.wide);
  }
}

template <typename Tile>
constexpr int kStageElements = 2 * DepthPanel<Tile, Tile::kRows>::kElements;

// partial[s, o, t, c] = sum over the pixels (n, a, b) of split s of
// grad_y[n, a, b, o] x[n, a * stride - padding + t * dilation, b, c].
// A block owns kRows of o by kCols of c for one t and one s.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) factorized_line_grad_weight_kernel(
    const __grid_constant__ GradWeightProblem<typename Tile::Value> p) {
  using T = typename Tile::Value;
  using Panel = DepthPanel<Tile, Tile::kRows>;
  T* const shared = shared_memory<T>();
  const int col_blocks = (p.x.channels + Tile::kCols - 1) / Tile::kCols;
  const int tap = static_cast<int>(blockIdx.x) % p.taps;
  const int block = static_cast<int>(blockIdx.x) / p.taps;
  const int first_row = block / col_blocks * Tile::kRows;
  const int first_col = block % col_blocks * Tile::kCols;
  const int begin = static_cast<int>(blockIdx.y) * p.panels;
  const int all = (p.pixels - 1) / Tile::kDepth + 1;
  const int panels = all - begin < p.panels ? all - begin : p.panels;

  Tile tile;
  tile.clear();
  run_stages<kStages>(
      shared, kStageElements<Tile>, panels,
      [&](int panel, T* to) {
        load_pixels<Tile>(to, p, (begin + panel) * Tile::kDepth, tap, first_row, first_col);
      },
      [&](int, const T* at) {
        tile.multiply(ByDepth{at, Panel::kPitch}, ByDepth{at + Panel::kElements, Panel::kPitch});
      });

  tile.each([&](int row, int col, const auto& sums) {
    const std::int64_t o = first_row + row, c = first_col + col, O = p.grad_y.channels;
    if (o >= O) return;
    acc_t<T>* const to = p.partial + ((blockIdx.y * O + o) * p.taps + tap) * p.x.channels + c;
#pragma unroll
    for (int e = 0; e < Tile::kRun; ++e) {
      if (c + e < p.x.channels) to[e] = sums[e];
    }
  });
}

// grad_weight[o, c, t] = sum over s of partial[s, o, t, c]; a thread owns an element.
template <typename T>
__global__ void __launch_bounds__(kAddThreads)
    factorized_line_add_kernel(const acc_t<T>* partial, int splits, LineWeight<T> like, T* to) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
  const std::int64_t count = std::int64_t{like.outputs} * like.taps * like.inputs;
  if (i >= count) return;
  acc_t<T> sum = 0;
  for (int s = 0; s < splits; ++s) sum += partial[s * count + i];
  const std::int64_t c = i % like.inputs, rest = i / like.inputs;
  to[rest / like.taps * like.output + c * like.input + rest % like.taps * like.tap] =
      static_cast<T>(sum);
}

struct Splits {
  int count, panels;
};

template <typename Tile>
Splits choose_splits(std::int64_t pixels, const TensorView& weight) {
  const auto& shape = weight.shape;
  const std::int64_t blocks = (shape[0] + Tile::kRows - 1) / Tile::kRows *
                              ((shape[1] + Tile::kCols - 1) / Tile::kCols) * shape[2] * shape[3];
  const std::int64_t all = std::max<std::int64_t>(1, (pixels + Tile::kDepth - 1) / Tile::kDepth);
  const std::int64_t wanted = (kBlocksWanted + blocks - 1) / blocks;
  const std::int64_t panels = std::max<std::int64_t>(kLeastPanels, (all + wanted - 1) / wanted);
  return {static_cast<int>((all + panels - 1) / panels), static_cast<int>(panels)};
}

std::int64_t pixels_of(const TensorView& t) { return t.shape[0] * t.shape[2] * t.shape[3]; }

}  // namespace

std::int64_t factorized_conv2d_partial_elements(const TensorView& grad_y, const TensorView& weight,
                                                const FactorizedConv2d& conv) {
  std::int64_t splits = 0;
  dispatch("factorized_conv2d_partial_elements", weight.dtype, [&](auto zero) {
    with_tile<decltype(zero)>(conv.tf32, [&](auto type) {
      splits = choose_splits<typename decltype(type)::type>(pixels_of(grad_y), weight).count;
    });
  });
  return splits * weight.shape[0] * weight.shape[1] * weight.shape[2] * weight.shape[3];
}

void factorized_conv2d_line_grad_weight(const TensorView& grad_y, const TensorView& x,
                                        const Line& grad_line, const TensorView& partial,
                                        const FactorizedConv2d& conv, void* stream) {
  const TensorView& grad_weight = grad_line.weight;
  const DeviceGuard guard(grad_weight.device_index);
  dispatch("factorized_conv2d_line_grad_weight", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_tile<T>(conv.tf32, [&](auto type) {
      using Tile = typename decltype(type)::type;
      const std::int64_t pixels = pixels_of(grad_y);
      const Splits splits = choose_splits<Tile>(pixels, grad_weight);
      const LineWeight<T> like = line_weight<T>(grad_weight, false);
      const GradWeightProblem<T> p{line_map<const T>(grad_y, grad_line.vertical),
                                   line_map<const T>(x, grad_line.vertical),
                                   partial.as<acc_t<T>>(),
                                   conv.stride,
                                   conv.padding,
                                   conv.dilation,
                                   static_cast<int>(pixels),
                                   like.taps,
                                   splits.panels,
                                   !grad_line.vertical};
      if (pixels > 0) {
        const int blocks = (like.outputs + Tile::kRows - 1) / Tile::kRows *
                           ((like.inputs + Tile::kCols - 1) / Tile::kCols) * like.taps;
        launch("factorized_line_grad_weight_kernel", factorized_line_grad_weight_kernel<Tile>,
               dim3(blocks, splits.count), dim3(Tile::kThreads),
               kStages * kStageElements<Tile> * sizeof(T), stream, p);
      }
      const std::int64_t count = std::int64_t{like.outputs} * like.inputs * like.taps;
      launch("factorized_line_add_kernel", factorized_line_add_kernel<T>,
             dim3(static_cast<unsigned>((count + kAddThreads - 1) / kAddThreads)),
             dim3(kAddThreads), 0, stream, p.partial, pixels > 0 ? splits.count : 0, like,
             grad_weight.as<T>());
    });
  });
}

}  // namespace pyeff::cuda
