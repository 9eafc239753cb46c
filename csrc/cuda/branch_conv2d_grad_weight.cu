// branch_conv2d, gradients of weight and bias: sums over the pixels of all pairs that took a
// branch, in the order of the launch plan. Every element has one owner; branches without pairs get
// zeros.

#include "cuda/branch_conv2d.cuh"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"

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

// A block owns kTile outputs and kTile channels of one tap of one branch. Steps of kDepth pixels of
// one pair pass through kStages buffers, in which a pixel is a row.
constexpr int kTile = 64, kThreads = 128, kStages = 3;

template <typename T>
constexpr int kDepth = 64 / sizeof(T);
template <typename T>
constexpr int kRow = kTile + 16 / sizeof(T);

struct Place {
  std::int64_t branch;
  int group, tap, first_output, first_channel;
};

template <typename T>
__device__ Place place_of(const GradProblem<T>& p, std::int64_t block) {
  const int out_tiles = (p.outputs + kTile - 1) / kTile;
  const int channel_tiles = (p.channels + kTile - 1) / kTile;
  const auto next = [&](int count) {
    const int digit = static_cast<int>(block % count);
    block /= count;
    return digit;
  };
  const int channel_tile = next(channel_tiles), out_tile = next(out_tiles);
  const int tap = next(p.taps.count()), group = next(p.groups);
  return {block, group, tap, out_tile * kTile, channel_tile * kTile};
}

// Fills the buffers of one step: gradients [kDepth, kTile] and pixels of x [kDepth, kTile].
template <typename T, bool kWhole>
__device__ void load_step(const GradProblem<T>& p, const Place& place, std::int64_t pair,
                          int first_pixel, T* to) {
  constexpr int kPieces = kTile / Chunk<T>::kElements;
  const std::int64_t n = pair / p.k, j = pair % p.k;
  const T* const grad = p.grad_y.map(n, j) + std::int64_t{place.group} * p.outputs;
  const T* const map = p.x.map(n, j) + std::int64_t{place.group} * p.channels;
  const int u = place.tap / p.taps.kernel_w, v = place.tap % p.taps.kernel_w;
#pragma unroll
  for (int i = 0; i < kDepth<T> * kPieces / kThreads; ++i) {
    const int id = threadIdx.x + i * kThreads, row = id / kPieces;
    const int piece = id % kPieces * Chunk<T>::kElements, pixel = first_pixel + row;
    const int output = place.first_output + piece, channel = place.first_channel + piece;
    const int r = pixel / p.grad_y.cols, c = pixel % p.grad_y.cols;
    int from_r = 0, from_c = 0;
    // A pixel of the gradient whose tap reads nothing counts for nothing.
    const bool read =
        pixel < p.grad_y.pixels() && p.taps.find(r, c, u, v, p.x.rows, p.x.cols, from_r, from_c);
    const bool has_output = read && output < p.outputs, has_channel = read && channel < p.channels;
    copy_piece<T, kWhole>(to + row * kRow<T> + piece,
                          has_output ? p.grad_y.at(grad, r, c) + output : p.grad_y.data,
                          p.outputs - output, has_output);
    copy_piece<T, kWhole>(to + (kDepth<T> + row) * kRow<T> + piece,
                          has_channel ? p.x.at(map, from_r, from_c) + channel : p.x.data,
                          p.channels - channel, has_channel);
  }
}

// The sums of a thread. `at(i, output, channel)` says which; both are counted within the block.
template <typename T, bool kTensorCores>
struct Sums;

// A warp has 32 outputs and 32 channels, in the layout of mma.m16n8k16.
template <typename T>
struct Sums<T, true> {
  static constexpr int kCount = 32;
  float d[2][4][4] = {};

  __device__ void add(const T* grads, const T* pixels) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, low = lane % 8;
    const T* const a_from =
        grads + (lane / 16 * 8 + low) * kRow<T> + warp % 2 * 32 + lane / 8 % 2 * 8;
    const T* const b_from =
        pixels + (lane / 8 % 2 * 8 + low) * kRow<T> + warp / 2 * 32 + lane / 16 * 8;
#pragma unroll
    for (int depth = 0; depth < kDepth<T>; depth += 16) {
      std::uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4_trans(a[i], a_from + depth * kRow<T> + i * 16);
        ldmatrix_x4_trans(b[i], b_from + depth * kRow<T> + i * 16);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const std::uint32_t operand[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          mma(d[m][n], a[m], operand, T{});
        }
      }
    }
  }
  __device__ float value(int i) const { return d[i / 16][i / 4 % 4][i % 4]; }
  __device__ static void at(int i, int& output, int& channel) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    output = warp % 2 * 32 + i / 16 * 16 + lane / 4 + i % 4 / 2 * 8;
    channel = warp / 2 * 32 + i / 4 % 4 * 8 + lane % 4 * 2 + i % 2;
  }
};

// A thread has every eighth output and every sixteenth channel.
template <typename T>
struct Sums<T, false> {
  static constexpr int kCount = 32;
  acc_t<T> d[8][4] = {};

  __device__ void add(const T* grads, const T* pixels) {
    const T* const a_from = grads + threadIdx.x / 16;
    const T* const b_from = pixels + threadIdx.x % 16;
#pragma unroll 4
    for (int depth = 0; depth < kDepth<T>; ++depth) {
      T a[8], b[4];
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] = a_from[depth * kRow<T> + i * 8];
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = b_from[depth * kRow<T> + i * 16];
#pragma unroll
      for (int m = 0; m < 8; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) d[m][n] += a[m] * b[n];
      }
    }
  }
  __device__ acc_t<T> value(int i) const { return d[i / 4][i % 4]; }
  __device__ static void at(int i, int& output, int& channel) {
    output = threadIdx.x / 16 + i / 4 * 8;
    channel = threadIdx.x % 16 + i % 4 * 16;
  }
};

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    branch_conv2d_grad_weight_kernel(const __grid_constant__ GradProblem<T> p) {
  constexpr int kStage = 2 * kDepth<T> * kRow<T>;
  T* const buffers = shared_memory<T>();  // [kStages, 2, kDepth, kRow]
  const Place place = place_of(p, blockIdx.x);
  const int first = p.offsets[place.branch];
  const int parts = (p.grad_y.pixels() + kDepth<T> - 1) / kDepth<T>;
  const std::int64_t count = std::int64_t{p.offsets[place.branch + 1] - first} * parts;
  Sums<T, kOnTensorCores<T>> sums;
  int next_pair = first, next_part = 0;
  const auto load_next = [&](std::int64_t stage) {
    load_step<T, kWhole>(p, place, p.order[next_pair], next_part * kDepth<T>,
                         buffers + stage % kStages * kStage);
    if (++next_part < parts) return;
    next_part = 0;
    ++next_pair;
  };
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < count) load_next(s);
    cp_async_commit();
  }
  for (std::int64_t s = 0; s < count; ++s) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (s + kStages - 1 < count) load_next(s + kStages - 1);
    cp_async_commit();
    const T* const grads = buffers + s % kStages * kStage;
    sums.add(grads, grads + kDepth<T> * kRow<T>);
  }
#pragma unroll
  for (int i = 0; i < sums.kCount; ++i) {
    int output, channel;
    sums.at(i, output, channel);
    output += place.first_output;
    channel += place.first_channel;
    if (output >= p.outputs || channel >= p.channels) continue;
    const std::int64_t row = (place.branch * p.groups + place.group) * p.outputs + output;
    p.grad_weight[(row * p.channels + channel) * p.taps.count() + place.tap] =
        static_cast<T>(sums.value(i));
  }
}

// --- sums by element -----------------------------------------------------------------------------

constexpr int kLanes = 32, kParts = kThreads / kLanes;

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
__global__ void __launch_bounds__(kThreads)
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
__global__ void __launch_bounds__(kThreads)
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
void run(const GradProblem<T>& p, void* stream) {
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
    const bool whole = is_whole(p.grad_y, p.outputs) && is_whole(p.x, p.channels);
    const auto kernel = whole ? branch_conv2d_grad_weight_kernel<T, true>
                              : branch_conv2d_grad_weight_kernel<T, false>;
    launch(name, kernel,
           grid(p.groups * p.taps.count() * tiles(p.outputs, kTile) * tiles(p.channels, kTile)),
           dim3(kThreads), kStages * 2 * kDepth<T> * kRow<T> * sizeof(T), stream, p);
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
    const auto groups = static_cast<int>(conv.groups);
    run<T>(
        {branch_maps<const T>(grad_y), branch_maps<const T>(x), order.as<const std::int32_t>(),
         offsets.as<const std::int32_t>(), grad_weight.as<T>(),
         grad_bias == nullptr ? nullptr : grad_bias->as<T>(),
         branch_taps(grad_weight, conv.window, false), grad_weight.shape[0],
         static_cast<int>(grad_y.shape[1]), groups, static_cast<int>(grad_weight.shape[1]) / groups,
         static_cast<int>(grad_weight.shape[2])},
        stream);
  });
}

}  // namespace pyeff::cuda
