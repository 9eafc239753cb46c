// branch_conv2d, gradients of weight and bias: sums over the pixels of all pairs that took a
// branch, in the order of the launch plan. Every element has one owner; branches without pairs get
// zeros.

#include "cuda/branch_conv2d.cuh"
#include "cuda/launch.cuh"

namespace pyeff::cuda {
namespace {

// grad_weight[b, o, i, tap] = sum over the pairs (n, j) of b and the pixels p of grad_y of
// grad_y[n, j, p, o] x[n, j, find(p, tap), i].
template <typename T>
struct GradProblem {
  BranchMaps<const T> grad_y, x;
  const std::int32_t *order, *offsets;  // [N * k], [B + 1]
  T* grad_weight;                       // [B, groups, outputs, channels, kh, kw]
  T* grad_bias;                         // [B, groups, outputs] or null
  BranchTaps taps;
  std::int64_t branches;
  int k, groups, outputs, channels;  // of a group
};

// A block owns a tile of outputs by channels, of one tap of one branch. Steps of kDepth pixels of
// one pair pass through kStages buffers, in which a pixel is a line.
constexpr int kStages = 3;
template <typename Tile>
constexpr int kStageElements =
    DepthPanel<Tile, Tile::kRows>::kElements + DepthPanel<Tile, Tile::kCols>::kElements;

struct Place {
  std::int64_t branch;
  int group, tap, first_output, first_channel;
};

template <typename Tile>
__device__ Place place_of(const GradProblem<typename Tile::Value>& p, std::int64_t block) {
  const int out_tiles = (p.outputs + Tile::kRows - 1) / Tile::kRows;
  const int channel_tiles = (p.channels + Tile::kCols - 1) / Tile::kCols;
  const auto next = [&](int count) {
    const int digit = static_cast<int>(block % count);
    block /= count;
    return digit;
  };
  const int channel_tile = next(channel_tiles), out_tile = next(out_tiles);
  const int tap = next(p.taps.count()), group = next(p.groups);
  return {block, group, tap, out_tile * Tile::kRows, channel_tile * Tile::kCols};
}

// Fills the buffers of one step: gradients [kDepth, kRows] and pixels of x [kDepth, kCols].
template <typename Tile>
__device__ void load_step(const GradProblem<typename Tile::Value>& p, const Place& place,
                          std::int64_t pair, int first_pixel, typename Tile::Value* to) {
  using T = typename Tile::Value;
  using Panel = DepthPanel<Tile, Tile::kRows>;
  static_assert(Tile::kRows == Tile::kCols);
  constexpr int kChunk = 16 / sizeof(T), kChunks = Tile::kRows / kChunk;
  const std::int64_t n = pair / p.k, j = pair % p.k;
  const T* const grad = p.grad_y.map(n, j) + std::int64_t{place.group} * p.outputs;
  const T* const map = p.x.map(n, j) + std::int64_t{place.group} * p.channels;
  const int u = place.tap / p.taps.kernel_w, v = place.tap % p.taps.kernel_w;
#pragma unroll
  for (int i = 0; i < Tile::kDepth * kChunks / Tile::kThreads; ++i) {
    const int id = threadIdx.x + i * Tile::kThreads, line = id / kChunks;
    const int at = id % kChunks * kChunk, pixel = first_pixel + line;
    const int r = pixel / p.grad_y.cols, c = pixel % p.grad_y.cols;
    int from_r = 0, from_c = 0;
    // A pixel of the gradient whose tap reads nothing counts for nothing.
    const bool read =
        pixel < p.grad_y.pixels() && p.taps.find(r, c, u, v, p.x.rows, p.x.cols, from_r, from_c);
    T* const to_grad = to + line * Panel::kPitch + at;
    load_chunk(to_grad, read ? p.grad_y.at(grad, r, c) : nullptr, p.grad_y.data,
               place.first_output + at, p.outputs, 1, p.grad_y.wide);
    load_chunk(to_grad + Panel::kElements, read ? p.x.at(map, from_r, from_c) : nullptr, p.x.data,
               place.first_channel + at, p.channels, 1, p.x.wide);
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    branch_conv2d_grad_weight_kernel(const __grid_constant__ GradProblem<typename Tile::Value> p) {
  using T = typename Tile::Value;
  using Panel = DepthPanel<Tile, Tile::kRows>;
  const Place place = place_of<Tile>(p, blockIdx.x);
  const int first = p.offsets[place.branch];
  const int parts = (p.grad_y.pixels() + Tile::kDepth - 1) / Tile::kDepth;
  int pair = first, part = 0;  // of the step that is loaded next
  Tile tile;
  tile.clear();
  run_stages<kStages>(
      shared_memory<T>(), kStageElements<Tile>,
      std::int64_t{p.offsets[place.branch + 1] - first} * parts,
      [&](std::int64_t, T* to) {
        load_step<Tile>(p, place, p.order[pair], part * Tile::kDepth, to);
        if (++part < parts) return;
        part = 0;
        ++pair;
      },
      [&](std::int64_t, const T* at) {
        tile.multiply(ByDepth{at, Panel::kPitch}, ByDepth{at + Panel::kElements, Panel::kPitch});
      });
  tile.each([&](int row, int col, const auto& sums) {
    const int output = place.first_output + row;
    if (output >= p.outputs) return;
    const std::int64_t line = (place.branch * p.groups + place.group) * p.outputs + output;
#pragma unroll
    for (int e = 0; e < Tile::kRun; ++e) {
      const int channel = place.first_channel + col + e;
      if (channel >= p.channels) return;
      p.grad_weight[(line * p.channels + channel) * p.taps.count() + place.tap] =
          static_cast<T>(sums[e]);
    }
  });
}

// --- sums by element -----------------------------------------------------------------------------

constexpr int kThreads = 128, kLanes = 32, kParts = kThreads / kLanes;

// Elements of a branch's weight, or of its bias: a warp has 32 of them, and the warps of a block
// share the pixels. `term(element, n, j, r, c)` is what a pixel adds.
template <typename T, typename Term>
__device__ acc_t<T> sum_over_pixels(const GradProblem<T>& p, std::int64_t branch, bool exists,
                                    const Term& term) {
  using A = acc_t<T>;
  A* const parts = shared_memory<A>();  // [kParts, kLanes]
  const int lane = threadIdx.x % kLanes, part = threadIdx.x / kLanes;
  A sum = 0;
  for (int i = p.offsets[branch]; exists && i < p.offsets[branch + 1]; ++i) {
    const std::int64_t pair = p.order[i], n = pair / p.k, j = pair % p.k;
    for (int pixel = part; pixel < p.grad_y.pixels(); pixel += kParts) {
      sum += term(n, j, pixel / p.grad_y.cols, pixel % p.grad_y.cols);
    }
  }
  parts[threadIdx.x] = sum;
  __syncthreads();
  A total = 0;
  for (int w = 0; w < kParts; ++w) total += parts[w * kLanes + lane];
  return total;
}

// The weight's gradient where groups leave a block too few channels for a tile. Neighbouring lanes
// have neighbouring outputs.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    branch_conv2d_grad_weight_grouped_kernel(const __grid_constant__ GradProblem<T> p) {
  using A = acc_t<T>;
  const std::int64_t outputs = std::int64_t{p.groups} * p.outputs;
  const std::int64_t elements = outputs * p.channels * p.taps.count();
  const std::int64_t blocks = (elements + kLanes - 1) / kLanes;
  const std::int64_t branch = blockIdx.x / blocks;
  const std::int64_t at = blockIdx.x % blocks * kLanes + threadIdx.x % kLanes;
  const std::int64_t output = at % outputs;
  const int channel = static_cast<int>(at / outputs % p.channels);
  const int tap = static_cast<int>(at / outputs / p.channels);
  const int u = tap / p.taps.kernel_w, v = tap % p.taps.kernel_w;
  const std::int64_t source = output / p.outputs * p.channels + channel;
  const A total =
      sum_over_pixels(p, branch, at < elements, [&](std::int64_t n, std::int64_t j, int r, int c) {
        int from_r, from_c;
        if (!p.taps.find(r, c, u, v, p.x.rows, p.x.cols, from_r, from_c)) return A(0);
        return static_cast<A>(p.grad_y.at(p.grad_y.map(n, j), r, c)[output]) *
               static_cast<A>(p.x.at(p.x.map(n, j), from_r, from_c)[source]);
      });
  if (at >= elements || threadIdx.x >= kLanes) return;
  p.grad_weight[((branch * outputs + output) * p.channels + channel) * p.taps.count() + tap] =
      static_cast<T>(total);
}

// grad_bias[b, o] = sum over the pairs and pixels of b of grad_y[n, j, p, o].
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    branch_conv2d_grad_bias_kernel(const __grid_constant__ GradProblem<T> p) {
  using A = acc_t<T>;
  const std::int64_t outputs = std::int64_t{p.groups} * p.outputs;
  const std::int64_t blocks = (outputs + kLanes - 1) / kLanes;
  const std::int64_t branch = blockIdx.x / blocks;
  const std::int64_t output = blockIdx.x % blocks * kLanes + threadIdx.x % kLanes;
  const A total = sum_over_pixels(
      p, branch, output < outputs, [&](std::int64_t n, std::int64_t j, int r, int c) {
        return static_cast<A>(p.grad_y.at(p.grad_y.map(n, j), r, c)[output]);
      });
  if (output >= outputs || threadIdx.x >= kLanes) return;
  p.grad_bias[branch * outputs + output] = static_cast<T>(total);
}

template <typename T>
void run(const GradProblem<T>& p, bool tf32, void* stream) {
  constexpr const char* name = "branch_conv2d_grad_weight";
  constexpr int kFewest = 8;  // channels or outputs of a group that are worth a tile
  const auto grid = [&](std::int64_t blocks) {
    return dim3(static_cast<unsigned>(p.branches * blocks));
  };
  const auto tiles = [](std::int64_t count, int tile) { return (count + tile - 1) / tile; };
  const std::int64_t outputs = std::int64_t{p.groups} * p.outputs;
  const std::size_t parts = kThreads * sizeof(acc_t<T>);
  if (p.groups > 1 && (p.channels < kFewest || p.outputs < kFewest)) {
    launch(name, branch_conv2d_grad_weight_grouped_kernel<T>,
           grid(tiles(outputs * p.channels * p.taps.count(), kLanes)), dim3(kThreads), parts,
           stream, p);
  } else {
    with_tile<T>(tf32, [&](auto type) {
      using Tile = typename decltype(type)::type;
      const std::int64_t blocks = p.groups * p.taps.count() * tiles(p.outputs, Tile::kRows) *
                                  tiles(p.channels, Tile::kCols);
      launch(name, branch_conv2d_grad_weight_kernel<Tile>, grid(blocks), dim3(Tile::kThreads),
             kStages * kStageElements<Tile> * sizeof(T), stream, p);
    });
  }
  if (p.grad_bias == nullptr) return;
  launch("branch_conv2d_grad_bias", branch_conv2d_grad_bias_kernel<T>, grid(tiles(outputs, kLanes)),
         dim3(kThreads), parts, stream, p);
}

}  // namespace

void branch_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& order, const TensorView& offsets,
                               const TensorView& grad_weight, const TensorView* grad_bias,
                               const BranchConv2d& conv, void* stream) {
  const DeviceGuard guard(x.device_index);
  dispatch("branch_conv2d_grad_weight", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::int64_t groups = conv.groups;
    const GradProblem<T> p{branch_maps<const T>(grad_y, groups),
                           branch_maps<const T>(x, groups),
                           order.as<const std::int32_t>(),
                           offsets.as<const std::int32_t>(),
                           grad_weight.as<T>(),
                           grad_bias == nullptr ? nullptr : grad_bias->as<T>(),
                           branch_taps(grad_weight, conv.window, false),
                           grad_weight.shape[0],
                           static_cast<int>(grad_y.shape[1]),
                           static_cast<int>(groups),
                           static_cast<int>(grad_weight.shape[1] / groups),
                           static_cast<int>(grad_weight.shape[2])};
    run(p, conv.tf32, stream);
  });
}

}  // namespace pyeff::cuda
