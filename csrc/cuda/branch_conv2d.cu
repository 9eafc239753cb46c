// branch_conv2d, forward and input gradient: the same sum over taps and channels, from the pixels
// of x or from those of the result's gradient.

#include "cuda/branch_conv2d.cuh"

#include "cuda/launch.cuh"

namespace pyeff::cuda {
namespace {

// A block owns a tile of pixels of one map by outputs. Steps of kDepth channels of one tap of one
// route pass through kStages buffers.
constexpr int kStages = 3;
template <typename Tile>
constexpr int kStageElements =
    RowPanel<Tile, Tile::kRows>::kElements + RowPanel<Tile, Tile::kCols>::kElements;

// Where a block takes one element for each of its threads.
constexpr int kThreads = 128;

// Steps in their order: routes, taps, channels. Every thread of a block counts them alike.
struct Step {
  int j, u, v, channel;
};

template <typename Tile>
struct Steps {
  const BranchProblem<typename Tile::Value>& p;
  int routes;

  __device__ int count() const {
    return routes * p.taps.count() * ((p.channels + Tile::kDepth - 1) / Tile::kDepth);
  }
  __device__ void advance(Step& step) const {
    step.channel += Tile::kDepth;
    if (step.channel < p.channels) return;
    step.channel = 0;
    if (++step.v < p.taps.kernel_w) return;
    step.v = 0;
    if (++step.u < p.taps.kernel_h) return;
    step.u = 0;
    ++step.j;
  }
};

// The block's place in the problem.
struct Place {
  std::int64_t n;
  int j, first_pixel, group, first_output;
};

template <typename Tile>
__device__ Place place_of(const BranchProblem<typename Tile::Value>& p, std::int64_t block) {
  const int out_tiles = (p.outputs + Tile::kCols - 1) / Tile::kCols;
  const int pixel_tiles = (p.result.pixels() + Tile::kRows - 1) / Tile::kRows;
  const int out_tile = static_cast<int>(block % out_tiles);
  block /= out_tiles;
  const int group = static_cast<int>(block % p.groups);
  block /= p.groups;
  const int pixel_tile = static_cast<int>(block % pixel_tiles);
  block /= pixel_tiles;
  const std::int64_t n = p.summed ? block : block / p.k;
  const int j = p.summed ? 0 : static_cast<int>(block % p.k);
  return {n, j, pixel_tile * Tile::kRows, group, out_tile * Tile::kCols};
}

// Fills the buffers of one step: pixels [kRows, kDepth] and weights [kCols, kDepth].
template <typename Tile>
__device__ void load_step(const BranchProblem<typename Tile::Value>& p, const Place& place,
                          const Step& step, typename Tile::Value* to) {
  using T = typename Tile::Value;
  using Pixels = RowPanel<Tile, Tile::kRows>;
  using Weights = RowPanel<Tile, Tile::kCols>;
  constexpr int kChunk = 16 / sizeof(T), kChunks = Tile::kDepth / kChunk;
  const std::int64_t branch = p.index[place.n * p.k + step.j];
  const bool exists = p.exists(branch);
  const T* const map = p.source.map(place.n, step.j) + std::int64_t{place.group} * p.channels;
  const int tap = step.u * p.taps.kernel_w + step.v;
  const T* const weights =
      p.weight +
      (((exists ? branch : 0) * p.groups + place.group) * p.outputs * p.taps.count() + tap) *
          p.channels;
#pragma unroll
  for (int i = 0; i < Tile::kRows * kChunks / Tile::kThreads; ++i) {
    const int id = threadIdx.x + i * Tile::kThreads, row = id / kChunks;
    const int at = id % kChunks * kChunk, pixel = place.first_pixel + row;
    int r = 0, c = 0;
    const bool read = exists && pixel < p.result.pixels() &&
                      p.taps.find(pixel / p.result.cols, pixel % p.result.cols, step.u, step.v,
                                  p.source.rows, p.source.cols, r, c);
    load_chunk(to + row * Pixels::kPitch + at, read ? p.source.at(map, r, c) : nullptr,
               p.source.data, step.channel + at, p.channels, 1, p.source.wide);
  }
  to += Pixels::kElements;
#pragma unroll
  for (int i = 0; i < Tile::kCols * kChunks / Tile::kThreads; ++i) {
    const int id = threadIdx.x + i * Tile::kThreads, row = id / kChunks;
    const int at = id % kChunks * kChunk, output = place.first_output + row;
    const bool read = exists && output < p.outputs;
    load_chunk(to + row * Weights::kPitch + at,
               read ? weights + std::int64_t{output} * p.taps.count() * p.channels : nullptr,
               p.weight, step.channel + at, p.channels, 1, p.wide);
  }
}

template <typename Tile>
__device__ void write_sums(const BranchProblem<typename Tile::Value>& p, const Place& place,
                           const Tile& tile) {
  using T = typename Tile::Value;
  const std::int64_t branch = p.index[place.n * p.k + place.j];
  const bool biased = p.bias != nullptr && p.exists(branch);
  T* const map = p.result.map(place.n, place.j) + std::int64_t{place.group} * p.outputs;
  tile.each([&](int row, int col, const auto& sums) {
    const int pixel = place.first_pixel + row;
    if (pixel >= p.result.pixels()) return;
    T* const to = p.result.at(map, pixel / p.result.cols, pixel % p.result.cols);
#pragma unroll
    for (int e = 0; e < Tile::kRun; ++e) {
      const int output = place.first_output + col + e;
      if (output >= p.outputs) return;
      acc_t<T> value = sums[e];
      if (biased) {
        const std::int64_t at = (branch * p.groups + place.group) * p.outputs + output;
        value += static_cast<acc_t<T>>(p.bias[at]);
      }
      to[output] = static_cast<T>(value);
    }
  });
}

// BranchProblem's sum. Every element has one owner, which sums in a fixed order.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    branch_conv2d_kernel(const __grid_constant__ BranchProblem<typename Tile::Value> p) {
  using T = typename Tile::Value;
  using Pixels = RowPanel<Tile, Tile::kRows>;
  const Place place = place_of<Tile>(p, blockIdx.x);
  const Steps<Tile> steps{p, p.summed ? p.k : 1};
  Step next{place.j, 0, 0, 0};
  Tile tile;
  tile.clear();
  run_stages<kStages>(
      shared_memory<T>(), kStageElements<Tile>, steps.count(),
      [&](int, T* to) {
        load_step<Tile>(p, place, next, to);
        steps.advance(next);
      },
      [&](int, const T* at) {
        tile.multiply(ByRow{at, Pixels::kPitch}, ByRow{at + Pixels::kElements, Pixels::kPitch});
      });
  write_sums(p, place, tile);
}

// The same sum where groups leave a block too few channels for a tile: a thread owns one element,
// its neighbours the next channels.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    branch_conv2d_grouped_kernel(const __grid_constant__ BranchProblem<T> p) {
  using A = acc_t<T>;
  const int outputs = p.groups * p.outputs;
  const std::int64_t per_item = std::int64_t{p.result.pixels()} * outputs;
  const std::int64_t at = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= p.items() * per_item) return;
  const std::int64_t item = at / per_item, rest = at % per_item;
  const std::int64_t n = p.summed ? item : item / p.k;
  const int first = p.summed ? 0 : static_cast<int>(item % p.k), last = p.summed ? p.k : first + 1;
  const int output = static_cast<int>(rest % outputs), pixel = static_cast<int>(rest / outputs);
  const int r = pixel / p.result.cols, c = pixel % p.result.cols;
  A sum = 0;
  for (int j = first; j < last; ++j) {
    const std::int64_t branch = p.index[n * p.k + j];
    if (!p.exists(branch)) continue;
    const T* const map = p.source.map(n, j) + output / p.outputs * p.channels;
    const T* w = p.weight + (branch * outputs + output) * p.taps.count() * p.channels;
    for (int u = 0; u < p.taps.kernel_h; ++u) {
      for (int v = 0; v < p.taps.kernel_w; ++v, w += p.channels) {
        int from_r, from_c;
        if (!p.taps.find(r, c, u, v, p.source.rows, p.source.cols, from_r, from_c)) continue;
        const T* const x = p.source.at(map, from_r, from_c);
        for (int i = 0; i < p.channels; ++i) sum += static_cast<A>(x[i]) * static_cast<A>(w[i]);
      }
    }
    if (p.bias != nullptr) sum += static_cast<A>(p.bias[branch * outputs + output]);
  }
  p.result.at(p.result.map(n, first), r, c)[output] = static_cast<T>(sum);
}

template <typename T>
void run(const char* name, const BranchProblem<T>& p, bool tf32, void* stream) {
  const std::int64_t pixels = p.result.pixels();
  if (p.items() * pixels == 0) return;
  constexpr int kFewest = 8;  // channels or outputs of a group that are worth a tile
  if (p.groups > 1 && (p.channels < kFewest || p.outputs < kFewest)) {
    const std::int64_t elements = p.items() * pixels * p.groups * p.outputs;
    launch(name, branch_conv2d_grouped_kernel<T>,
           dim3(static_cast<unsigned>((elements + kThreads - 1) / kThreads)), dim3(kThreads), 0,
           stream, p);
    return;
  }
  with_tile<T>(tf32, [&](auto type) {
    using Tile = typename decltype(type)::type;
    const std::int64_t blocks = p.items() * ((pixels + Tile::kRows - 1) / Tile::kRows) * p.groups *
                                ((p.outputs + Tile::kCols - 1) / Tile::kCols);
    launch(name, branch_conv2d_kernel<Tile>, dim3(static_cast<unsigned>(blocks)),
           dim3(Tile::kThreads), kStages * kStageElements<Tile> * sizeof(T), stream, p);
  });
}

template <typename T>
BranchProblem<T> problem_of(const TensorView& source, const TensorView& weight,
                            const TensorView* bias, const TensorView& index,
                            const TensorView& result, const BranchConv2d& conv, bool inverse) {
  const std::int64_t groups = conv.groups;
  const T* const numbers = weight.as<const T>();
  return {branch_maps<const T>(source, groups),
          branch_maps<T>(result, groups),
          numbers,
          bias == nullptr ? nullptr : bias->as<const T>(),
          index.as<const std::int32_t>(),
          branch_taps(weight, conv.window, inverse),
          index.shape[0],
          weight.shape[0],
          static_cast<int>(index.shape[1]),
          static_cast<int>(groups),
          static_cast<int>(weight.shape[1] / groups),
          static_cast<int>(weight.shape[2]),
          inverse && result.ndim == 4,
          aligned(numbers, weight, 2) && fills_chunks<T>(weight.shape[2])};
}

}  // namespace

void branch_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* bias,
                           const TensorView& index, const TensorView& y, const BranchConv2d& conv,
                           void* stream) {
  const DeviceGuard guard(x.device_index);
  dispatch("branch_conv2d", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    run<T>("branch_conv2d", problem_of<T>(x, weight, bias, index, y, conv, false), conv.tf32,
           stream);
  });
}

void branch_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& index, const TensorView& grad_x,
                              const BranchConv2d& conv, void* stream) {
  const DeviceGuard guard(grad_y.device_index);
  dispatch("branch_conv2d_grad_input", grad_y.dtype, [&](auto zero) {
    using T = decltype(zero);
    run<T>("branch_conv2d_grad_input",
           problem_of<T>(grad_y, weight, nullptr, index, grad_x, conv, true), conv.tf32, stream);
  });
}

}  // namespace pyeff::cuda
