// branch_conv2d, forward and input gradient: the same sum over taps and channels, from the pixels
// of x or from those of the result's gradient.

#include "cuda/branch_conv2d.cuh"

#include "cuda/launch.cuh"
#include "cuda/warp.cuh"

namespace pyeff::cuda {
namespace {

// A block owns kPixels pixels of one map and kOutputs outputs. Steps of kDepth channels of one tap
// of one route pass through kStages buffers; a row of a buffer is 64 bytes and 16 that keep eight
// rows in different banks.
constexpr int kPixels = 64, kOutputs = 64, kThreads = 128, kStages = 3;
constexpr int kRowBytes = 80, kPieces = 4;

template <typename T>
constexpr int kDepth = 64 / sizeof(T);
template <typename T>
constexpr int kRow = kRowBytes / sizeof(T);

// Steps in their order: routes, taps, channels. Every thread of a block counts them alike.
struct Step {
  int j, u, v, channel;
};

template <typename T>
struct Steps {
  const BranchProblem<T>& p;
  int first_route, routes;

  __device__ int count() const {
    return routes * p.taps.count() * ((p.channels + kDepth<T> - 1) / kDepth<T>);
  }
  __device__ void advance(Step& step) const {
    step.channel += kDepth<T>;
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

template <typename T>
__device__ Place place_of(const BranchProblem<T>& p, std::int64_t block) {
  const int out_tiles = (p.outputs + kOutputs - 1) / kOutputs;
  const int pixel_tiles = (p.result.pixels() + kPixels - 1) / kPixels;
  const int out_tile = static_cast<int>(block % out_tiles);
  block /= out_tiles;
  const int group = static_cast<int>(block % p.groups);
  block /= p.groups;
  const int pixel_tile = static_cast<int>(block % pixel_tiles);
  block /= pixel_tiles;
  const std::int64_t n = p.summed ? block : block / p.k;
  const int j = p.summed ? 0 : static_cast<int>(block % p.k);
  return {n, j, pixel_tile * kPixels, group, out_tile * kOutputs};
}

// Fills the buffers of one step: pixels [kPixels, kDepth] and weights [kOutputs, kDepth].
template <typename T, bool kWhole>
__device__ void load_step(const BranchProblem<T>& p, const Place& place, const Step& step, T* to) {
  const std::int64_t branch = p.index[place.n * p.k + step.j];
  const bool exists = p.exists(branch);
  const T* const map =
      p.source.map(place.n, step.j) + std::int64_t{place.group} * p.channels + step.channel;
  const int tap = step.u * p.taps.kernel_w + step.v;
  const T* const weights =
      p.weight +
      (((exists ? branch : 0) * p.groups + place.group) * p.outputs * p.taps.count() + tap) *
          p.channels +
      step.channel;
#pragma unroll
  for (int i = 0; i < kPixels * kPieces / kThreads; ++i) {
    const int id = threadIdx.x + i * kThreads, row = id / kPieces;
    const int channel = id % kPieces * Chunk<T>::kElements;
    const int pixel = place.first_pixel + row;
    int r = 0, c = 0;
    const bool read = exists && pixel < p.result.pixels() &&
                      p.taps.find(pixel / p.result.cols, pixel % p.result.cols, step.u, step.v,
                                  p.source.rows, p.source.cols, r, c);
    copy_piece<T, kWhole>(to + row * kRow<T> + channel,
                          read ? p.source.at(map, r, c) + channel : p.source.data,
                          p.channels - step.channel - channel, read);
  }
  to += kPixels * kRow<T>;
#pragma unroll
  for (int i = 0; i < kOutputs * kPieces / kThreads; ++i) {
    const int id = threadIdx.x + i * kThreads, row = id / kPieces;
    const int channel = id % kPieces * Chunk<T>::kElements;
    const bool read = exists && place.first_output + row < p.outputs;
    const std::int64_t offset =
        std::int64_t{place.first_output + row} * p.taps.count() * p.channels + channel;
    copy_piece<T, kWhole>(to + row * kRow<T> + channel, read ? weights + offset : p.weight,
                          p.channels - step.channel - channel, read);
  }
}

// The sums of a thread. `at(i, pixel, output)` says which; both are counted within the block.
template <typename T, bool kTensorCores>
struct Sums;

// A warp has 32 pixels and 32 outputs, in the layout of mma.m16n8k16.
template <typename T>
struct Sums<T, true> {
  static constexpr int kCount = 32;
  float d[2][4][4] = {};

  __device__ void add(const T* pixels, const T* weights) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T* const a_row = pixels + (warp % 2 * 32 + lane % 16) * kRow<T> + lane / 16 * 8;
    const T* const b_row =
        weights + (warp / 2 * 32 + lane / 16 * 8 + lane % 8) * kRow<T> + lane / 8 % 2 * 8;
#pragma unroll
    for (int depth = 0; depth < kDepth<T>; depth += 16) {
      std::uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4(a[i], a_row + i * 16 * kRow<T> + depth);
        ldmatrix_x4(b[i], b_row + i * 16 * kRow<T> + depth);
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
  __device__ static void at(int i, int& pixel, int& output) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    pixel = warp % 2 * 32 + i / 16 * 16 + lane / 4 + i % 4 / 2 * 8;
    output = warp / 2 * 32 + i / 4 % 4 * 8 + lane % 4 * 2 + i % 2;
  }
};

// A thread has every eighth pixel and every sixteenth output.
template <typename T>
struct Sums<T, false> {
  static constexpr int kCount = 32;
  acc_t<T> d[8][4] = {};

  __device__ void add(const T* pixels, const T* weights) {
    const T* const a_row = pixels + threadIdx.x / 16 * kRow<T>;
    const T* const b_row = weights + threadIdx.x % 16 * kRow<T>;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Chunk<T> a[8], b[4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a[i] = reinterpret_cast<const Chunk<T>*>(a_row + i * 8 * kRow<T>)[piece];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        b[i] = reinterpret_cast<const Chunk<T>*>(b_row + i * 16 * kRow<T>)[piece];
      }
#pragma unroll
      for (int e = 0; e < Chunk<T>::kElements; ++e) {
#pragma unroll
        for (int m = 0; m < 8; ++m) {
#pragma unroll
          for (int n = 0; n < 4; ++n) d[m][n] += a[m].v[e] * b[n].v[e];
        }
      }
    }
  }
  __device__ acc_t<T> value(int i) const { return d[i / 4][i % 4]; }
  __device__ static void at(int i, int& pixel, int& output) {
    pixel = threadIdx.x / 16 + i / 4 * 8;
    output = threadIdx.x % 16 + i % 4 * 16;
  }
};

template <typename T, typename S>
__device__ void write_sums(const BranchProblem<T>& p, const Place& place, const S& sums) {
  using A = acc_t<T>;
  const std::int64_t branch = p.index[place.n * p.k + place.j];
  const bool biased = p.bias != nullptr && p.exists(branch);
  T* const map = p.result.map(place.n, place.j) + std::int64_t{place.group} * p.outputs;
#pragma unroll
  for (int i = 0; i < S::kCount; ++i) {
    int pixel, output;
    S::at(i, pixel, output);
    pixel += place.first_pixel;
    output += place.first_output;
    if (pixel >= p.result.pixels() || output >= p.outputs) continue;
    A value = sums.value(i);
    if (biased) {
      value += static_cast<A>(p.bias[(branch * p.groups + place.group) * p.outputs + output]);
    }
    p.result.at(map, pixel / p.result.cols, pixel % p.result.cols)[output] = static_cast<T>(value);
  }
}

// BranchProblem's sum. kWhole: every piece of 16 bytes is whole and aligned, and comes by cp.async.
// Every element has one owner, which sums in a fixed order.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    branch_conv2d_kernel(const __grid_constant__ BranchProblem<T> p) {
  constexpr int kStage = (kPixels + kOutputs) * kRow<T>;
  T* const buffers = shared_memory<T>();  // [kStages, kPixels + kOutputs, kRow]
  const Place place = place_of(p, blockIdx.x);
  const Steps<T> steps{p, place.j, p.summed ? p.k : 1};
  const int count = steps.count();
  Step next{place.j, 0, 0, 0};
  Sums<T, kOnTensorCores<T>> sums;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < count) {
      load_step<T, kWhole>(p, place, next, buffers + s * kStage);
      steps.advance(next);
    }
    cp_async_commit();
  }
  for (int s = 0; s < count; ++s) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (s + kStages - 1 < count) {
      load_step<T, kWhole>(p, place, next, buffers + (s + kStages - 1) % kStages * kStage);
      steps.advance(next);
    }
    cp_async_commit();
    const T* const pixels = buffers + s % kStages * kStage;
    sums.add(pixels, pixels + kPixels * kRow<T>);
  }
  write_sums(p, place, sums);
}

// The same sum where groups leave a block too few channels for a tile: a thread owns one element,
// its neighbours the next channels.
template <typename T>
__global__ void __launch_bounds__(kThreads)
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
void run(const char* name, const BranchProblem<T>& p, void* stream) {
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
  const std::int64_t blocks = p.items() * ((pixels + kPixels - 1) / kPixels) * p.groups *
                              ((p.outputs + kOutputs - 1) / kOutputs);
  const bool whole =
      is_whole(p.source, p.channels) && reinterpret_cast<std::uintptr_t>(p.weight) % 16 == 0;
  const auto kernel = whole ? branch_conv2d_kernel<T, true> : branch_conv2d_kernel<T, false>;
  launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
         kStages * (kPixels + kOutputs) * kRowBytes, stream, p);
}

}  // namespace

void branch_conv2d_forward(const TensorView& x, const TensorView& weight, const TensorView* bias,
                           const TensorView& index, const TensorView& y, const BranchConv2d& conv,
                           void* stream) {
  const DeviceGuard guard(x.device_index);
  dispatch("branch_conv2d", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto groups = static_cast<int>(conv.groups);
    run<T>("branch_conv2d",
           {branch_maps<const T>(x), branch_maps<T>(y), weight.as<const T>(),
            bias == nullptr ? nullptr : bias->as<const T>(), index.as<const std::int32_t>(),
            branch_taps(weight, conv.window, false), index.shape[0], weight.shape[0],
            static_cast<int>(index.shape[1]), groups, static_cast<int>(weight.shape[1]) / groups,
            static_cast<int>(weight.shape[2]), false},
           stream);
  });
}

void branch_conv2d_grad_input(const TensorView& grad_y, const TensorView& weight,
                              const TensorView& index, const TensorView& grad_x,
                              const BranchConv2d& conv, void* stream) {
  const DeviceGuard guard(grad_y.device_index);
  dispatch("branch_conv2d_grad_input", grad_y.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto groups = static_cast<int>(conv.groups);
    run<T>("branch_conv2d_grad_input",
           {branch_maps<const T>(grad_y), branch_maps<T>(grad_x), weight.as<const T>(), nullptr,
            index.as<const std::int32_t>(), branch_taps(weight, conv.window, true), index.shape[0],
            weight.shape[0], static_cast<int>(index.shape[1]), groups,
            static_cast<int>(weight.shape[1]) / groups, static_cast<int>(weight.shape[2]),
            grad_x.ndim == 4},
           stream);
  });
}

}  // namespace pyeff::cuda
