// combine, forward and gradients. A pair has one row, so that every product is one of a matrix and
// a vector: the projection is read once a pair, and memory decides. No atomics; every element has
// one owner, which sums in a fixed order.

#include "pyeff/combine.h"

#include "cuda/common.cuh"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"
#include "cuda/warp_sum.cuh"

namespace pyeff::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;

// The rows of one call; pair n * k + j is y[n, j].
template <typename T>
struct Problem {
  const T* y;  // [N, k, F]
  std::int64_t y_image, y_route;
  const T* projection;        // [B, O, F]
  const std::int32_t* index;  // [N, k]
  const T* route_weight;      // [N, k]
  std::int64_t images, k, features, outputs, branches;

  __device__ const T* row(std::int64_t pair) const {
    return y + pair / k * y_image + pair % k * y_route;
  }
  __device__ acc_t<T> share(std::int64_t pair) const {
    return static_cast<acc_t<T>>(route_weight[pair]);
  }
  // Of the pair, or null where its route names no branch.
  __device__ const T* matrix(std::int64_t pair) const {
    const std::int64_t b = index[pair];
    return b < 0 || b >= branches ? nullptr : projection + b * outputs * features;
  }
};

constexpr int kOutputs = 4;  // of a warp: one read of y serves them

// out[n, o] = bias[o] + sum_j route_weight[n, j] sum_f projection[index[n, j], o, f] y[n, j, f].
// A warp owns kOutputs outputs of an image; its lanes share the features.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_forward_kernel(const Problem<T> p, const T* __restrict__ bias,  // [O] or null
                           T* __restrict__ out) {                           // [N, O]
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t groups = (p.outputs + kOutputs - 1) / kOutputs;
  const std::int64_t task = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (task >= p.images * groups) return;  // the whole warp
  const std::int64_t n = task / groups, first = task % groups * kOutputs;
  A sum[kOutputs] = {};
  for (std::int64_t pair = n * p.k; pair < (n + 1) * p.k; ++pair) {
    const T* const matrix = p.matrix(pair);
    if (matrix == nullptr) continue;
    const T *const row = p.row(pair), *const block = matrix + first * p.features;
    const A share = p.share(pair);
    for (std::int64_t f = lane; f < p.features; f += kWarp) {
      const A value = share * static_cast<A>(row[f]);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        if (first + o < p.outputs) sum[o] += static_cast<A>(block[o * p.features + f]) * value;
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const A total = sum_of_warp(sum[o]);
    const std::int64_t output = first + o;
    if (lane != o || output >= p.outputs) continue;
    const A added = bias == nullptr ? A(0) : static_cast<A>(bias[output]);
    out[n * p.outputs + output] = static_cast<T>(total + added);
  }
}

// With v[f] = sum_o projection[index[n, j], o, f] grad_out[n, o]:
//   grad_y[n, j, f] = route_weight[n, j] v[f]   grad_route_weight[n, j] = sum_f v[f] y[n, j, f]
// A block owns a pair. Its warps share the outputs and meet in shared memory, 32 features at a
// time.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_grad_input_kernel(const Problem<T> p, const T* __restrict__ grad_out,  // [N, O]
                              T* __restrict__ grad_y,  // [N, k, F] or null
                              std::int64_t grad_image, std::int64_t grad_route,
                              T* __restrict__ grad_route_weight) {  // [N, k] or null
  using A = acc_t<T>;
  A* const parts = shared_memory<A>();  // [kWarps, 32]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t pair = blockIdx.x;
  const T* const matrix = p.matrix(pair);
  const T* const grad = grad_out + pair / p.k * p.outputs;
  const T* const row = p.row(pair);
  A slope = 0;
  for (std::int64_t f = lane; f - lane < p.features; f += kWarp) {
    A part = 0;
    if (matrix != nullptr && f < p.features) {
#pragma unroll 4
      for (std::int64_t o = warp; o < p.outputs; o += kWarps) {
        part += static_cast<A>(matrix[o * p.features + f]) * static_cast<A>(grad[o]);
      }
    }
    parts[threadIdx.x] = part;
    __syncthreads();
    if (warp == 0 && f < p.features) {
      A v = 0;
      for (int w = 0; w < kWarps; ++w) v += parts[w * kWarp + lane];
      if (grad_y != nullptr) {
        grad_y[pair / p.k * grad_image + pair % p.k * grad_route + f] =
            static_cast<T>(matrix == nullptr ? A(0) : p.share(pair) * v);
      }
      if (grad_route_weight != nullptr && matrix != nullptr) slope += v * static_cast<A>(row[f]);
    }
    __syncthreads();
  }
  if (warp != 0 || grad_route_weight == nullptr) return;
  slope = sum_of_warp(slope);
  if (lane == 0) grad_route_weight[pair] = static_cast<T>(slope);
}

constexpr int kTile = 32;  // outputs and features of a block

// grad_projection[b, o, f] = sum of route_weight[n, j] grad_out[n, o] y[n, j, f] over the pairs of
// b, in their order. A block owns a tile of one projection, a thread one feature of every eighth
// output of it; branches without pairs get zeros.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_grad_projection_kernel(const Problem<T> p, const T* __restrict__ grad_out,  // [N, O]
                                   const std::int32_t* __restrict__ order,
                                   const std::int32_t* __restrict__ offsets,
                                   T* __restrict__ grad_projection) {  // [B, O, F]
  using A = acc_t<T>;
  const std::int64_t feature_tiles = (p.features + kTile - 1) / kTile;
  const std::int64_t output_tiles = (p.outputs + kTile - 1) / kTile;
  const std::int64_t tile = blockIdx.x, b = tile / (feature_tiles * output_tiles);
  const std::int64_t f = tile % feature_tiles * kTile + threadIdx.x % kWarp;
  const std::int64_t first = tile / feature_tiles % output_tiles * kTile + threadIdx.x / kWarp;
  if (f >= p.features) return;
  A sum[kTile / kWarps] = {};
  for (int i = offsets[b]; i < offsets[b + 1]; ++i) {
    const std::int64_t pair = order[i];
    const T* const grad = grad_out + pair / p.k * p.outputs;
    const A value = p.share(pair) * static_cast<A>(p.row(pair)[f]);
#pragma unroll
    for (int o = 0; o < kTile / kWarps; ++o) {
      const std::int64_t output = first + o * kWarps;
      if (output < p.outputs) sum[o] += static_cast<A>(grad[output]) * value;
    }
  }
#pragma unroll
  for (int o = 0; o < kTile / kWarps; ++o) {
    const std::int64_t output = first + o * kWarps;
    if (output < p.outputs) {
      grad_projection[(b * p.outputs + output) * p.features + f] = static_cast<T>(sum[o]);
    }
  }
}

template <typename T>
Problem<T> problem_of(const TensorView& y, const TensorView& projection, const TensorView* index,
                      const TensorView& route_weight) {
  return {y.as<const T>(),
          y.stride[0],
          y.stride[1],
          projection.as<const T>(),
          index == nullptr ? nullptr : index->as<const std::int32_t>(),
          route_weight.as<const T>(),
          y.shape[0],
          y.shape[1],
          projection.shape[2],
          projection.shape[1],
          projection.shape[0]};
}

dim3 grid_of(std::int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

}  // namespace

void combine_forward(const TensorView& y, const TensorView& projection, const TensorView* bias,
                     const TensorView& index, const TensorView& route_weight, const TensorView& out,
                     void* stream) {
  const std::int64_t warps = out.shape[0] * ((out.shape[1] + kOutputs - 1) / kOutputs);
  if (warps == 0) return;
  const DeviceGuard guard(y.device_index);
  dispatch("combine", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch("combine", combine_forward_kernel<T>, grid_of((warps + kWarps - 1) / kWarps),
           dim3(kThreads), 0, stream, problem_of<T>(y, projection, &index, route_weight),
           bias == nullptr ? static_cast<const T*>(nullptr) : bias->as<const T>(), out.as<T>());
  });
}

void combine_grad_input(const TensorView& grad_out, const TensorView& y,
                        const TensorView& projection, const TensorView& index,
                        const TensorView& route_weight, const TensorView* grad_y,
                        const TensorView* grad_route_weight, void* stream) {
  const std::int64_t pairs = index.shape[0] * index.shape[1];
  if (pairs == 0) return;
  const DeviceGuard guard(y.device_index);
  dispatch("combine_grad_input", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* none = nullptr;
    launch("combine_grad_input", combine_grad_input_kernel<T>, grid_of(pairs), dim3(kThreads),
           kThreads * sizeof(acc_t<T>), stream, problem_of<T>(y, projection, &index, route_weight),
           grad_out.as<const T>(), grad_y == nullptr ? none : grad_y->as<T>(),
           grad_y == nullptr ? std::int64_t{0} : grad_y->stride[0],
           grad_y == nullptr ? std::int64_t{0} : grad_y->stride[1],
           grad_route_weight == nullptr ? none : grad_route_weight->as<T>());
  });
}

void combine_grad_projection(const TensorView& grad_out, const TensorView& y,
                             const TensorView& order, const TensorView& offsets,
                             const TensorView& route_weight, const TensorView& grad_projection,
                             void* stream) {
  const std::int64_t tiles = grad_projection.shape[0] *
                             ((grad_projection.shape[1] + kTile - 1) / kTile) *
                             ((grad_projection.shape[2] + kTile - 1) / kTile);
  if (tiles == 0) return;
  const DeviceGuard guard(y.device_index);
  dispatch("combine_grad_projection", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch("combine_grad_projection", combine_grad_projection_kernel<T>, grid_of(tiles),
           dim3(kThreads), 0, stream, problem_of<T>(y, grad_projection, nullptr, route_weight),
           grad_out.as<const T>(), order.as<const std::int32_t>(), offsets.as<const std::int32_t>(),
           grad_projection.as<T>());
  });
}

}  // namespace pyeff::cuda
