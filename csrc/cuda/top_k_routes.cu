// top_k_routes: the routes of an image by a warp, their gradient, and the launch plan of the
// kernels that work branch by branch. No atomics: results repeat bit for bit.

#include "pyeff/top_k_routes.h"

#include <algorithm>
#include <cmath>

#include "cuda/common.cuh"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"
#include "cuda/warp_sum.cuh"

namespace pyeff::cuda {
namespace {

constexpr int kWarps = 4;  // images of a block

// A branch with its score, or what comes after all branches.
template <typename A>
struct Scored {
  A score;
  int branch;
};

template <typename A>
__device__ Scored<A> nothing() {
  return {A(NAN), 0x7fffffff};
}

// By falling score, NaN last, of equal scores the lower branch first.
template <typename A>
__device__ bool goes_before(const Scored<A>& a, const Scored<A>& b) {
  const bool a_nan = a.score != a.score, b_nan = b.score != b.score;
  if (a_nan != b_nan) return b_nan;
  if (!a_nan && a.score != b.score) return a.score > b.score;
  return a.branch < b.branch;
}

// The first of all lanes, for every lane.
template <typename A>
__device__ Scored<A> first_of_warp(Scored<A> mine) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const Scored<A> other{__shfl_xor_sync(kAllLanes, mine.score, step),
                          __shfl_xor_sync(kAllLanes, mine.branch, step)};
    if (goes_before(other, mine)) mine = other;
  }
  return mine;
}

template <typename T>
struct Rows {
  const T* data;
  std::int64_t n_stride, b_stride;
  std::int64_t images, branches, k;
};

// index[n, j] = the j-th branch of the row; weight[n, j] = softmax over the kept, or one. A warp
// owns an image. It takes the branches one after the other: the next is the first of those that
// come after the last one, so nothing is marked as taken, and rows of any length need no memory.
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp, 8)
    top_k_routes_kernel(Rows<T> scores, std::int32_t* __restrict__ index,  // [N, k]
                        T* __restrict__ weight,                            // [N, k]
                        bool softmax) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t n = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (n >= scores.images) return;  // the whole warp
  const T* row = scores.data + n * scores.n_stride;
  std::int32_t* routes = index + n * scores.k;
  Scored<A> last{A(INFINITY), -1}, best = last;
  bool nan = false;
  for (std::int64_t j = 0; j < scores.k; ++j) {
    Scored<A> mine = nothing<A>();
    for (std::int64_t b = lane; b < scores.branches; b += kWarp) {
      const Scored<A> one{static_cast<A>(row[b * scores.b_stride]), static_cast<int>(b)};
      nan = nan || one.score != one.score;
      if (goes_before(last, one) && goes_before(one, mine)) mine = one;
    }
    last = first_of_warp(mine);
    if (j == 0) best = last;
    if (j % kWarp == lane) routes[j] = last.branch;
  }
  T* shares = weight + n * scores.k;
  if (!softmax) {
    for (std::int64_t j = lane; j < scores.k; j += kWarp) shares[j] = static_cast<T>(A(1));
    return;
  }
  // A lane reads the routes that it wrote itself.
  const auto power = [&](std::int64_t j) {
    return std::exp(static_cast<A>(row[routes[j] * scores.b_stride]) - best.score);
  };
  A total = 0;
  for (std::int64_t j = lane; j < scores.k; j += kWarp) total += power(j);
  total = sum_of_warp(total);
  const bool any_nan = __ballot_sync(kAllLanes, nan) != 0;
  for (std::int64_t j = lane; j < scores.k; j += kWarp) {
    shares[j] = static_cast<T>(any_nan ? A(NAN) : power(j) / total);
  }
}

// grad_scores[n, b] = sum over j with index[n, j] = b of weight[n, j] (g[n, j] - mean), with
// mean = sum_i weight[n, i] g[n, i]. A warp owns an image, whose routes differ.
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp)
    top_k_routes_grad_kernel(const T* __restrict__ grad_weight,       // [N, k]
                             const std::int32_t* __restrict__ index,  // [N, k]
                             const T* __restrict__ weight,            // [N, k]
                             T* __restrict__ grad_scores,             // [N, B]
                             std::int64_t images, std::int64_t branches, std::int64_t k) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t n = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (n >= images) return;
  const T *grad = grad_weight + n * k, *share = weight + n * k;
  T* out = grad_scores + n * branches;
  A mean = 0;
  for (std::int64_t j = lane; j < k; j += kWarp) {
    mean += static_cast<A>(share[j]) * static_cast<A>(grad[j]);
  }
  mean = sum_of_warp(mean);
  for (std::int64_t b = lane; b < branches; b += kWarp) out[b] = static_cast<T>(A(0));
  __syncwarp();
  for (std::int64_t j = lane; j < k; j += kWarp) {
    const std::int32_t b = index[n * k + j];
    if (b < 0 || b >= branches) continue;
    out[b] = static_cast<T>(static_cast<A>(share[j]) * (static_cast<A>(grad[j]) - mean));
  }
}

// --- launch plan ---------------------------------------------------------------------------------

constexpr int kPlanWarps = 32;
constexpr std::int64_t kPlanCounters = 24 * 1024;  // 96 KB of shared memory, which all have

// The lanes whose value is that of this lane.
__device__ unsigned peers_of(int value) {
  unsigned peers = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    peers |= static_cast<unsigned>(__shfl_sync(kAllLanes, value, lane) == value) << lane;
  }
  return peers;
}

// Each value becomes the sum of those before it; a warp does that.
__device__ void add_up(int* values, int count, int lane) {
  int before = 0;
  for (int base = 0; base < count; base += kWarp) {
    const int own = base + lane < count ? values[base + lane] : 0;
    int sum = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const int lower = __shfl_sync(kAllLanes, sum, lane < step ? lane : lane - step);
      if (lane >= step) sum += lower;
    }
    if (base + lane < count) values[base + lane] = before + sum - own;
    before += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
}

// A stable counting sort of the pairs by branch, in one block. Each warp counts its part of the
// pairs by branch; the counts become places, branch by branch and within a branch warp by warp;
// each warp puts its pairs there. One lane of those with equal branches moves their counter.
__global__ void __launch_bounds__(kPlanWarps* kWarp)
    branch_plan_kernel(const std::int32_t* __restrict__ index,  // [pairs]
                       std::int32_t* __restrict__ order,        // [pairs]
                       std::int32_t* __restrict__ offsets,      // [B + 1]
                       int pairs, int branches) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int keys = branches + 1;             // the last one of routes to no branch
  int* const counts = shared_memory<int>();  // [warps, keys]
  int* const first = counts + warps * keys;  // [keys]
  int* const mine = counts + warp * keys;
  for (int i = threadIdx.x; i < warps * keys; i += blockDim.x) counts[i] = 0;
  __syncthreads();

  const int part = (pairs + warps * kWarp - 1) / (warps * kWarp) * kWarp;
  const int begin = warp * part < pairs ? warp * part : pairs;
  const int end = begin + part < pairs ? begin + part : pairs;
  const auto for_pairs = [&](auto use) {
    for (int base = begin; base < end; base += kWarp) {
      const int pair = base + lane;
      int key = -1;  // of lanes past the end
      if (pair < end) {
        key = index[pair];
        if (key < 0 || key >= branches) key = branches;
      }
      const unsigned peers = peers_of(key), lower = peers & ((1u << lane) - 1u);
      if (key >= 0) use(pair, key, __popc(lower));
      __syncwarp();
      if (key >= 0 && lower == 0) mine[key] += __popc(peers);
      __syncwarp();
    }
  };
  for_pairs([](int, int, int) {});
  __syncthreads();

  for (int key = threadIdx.x; key < keys; key += blockDim.x) {
    int total = 0;
    for (int w = 0; w < warps; ++w) {
      const int count = counts[w * keys + key];
      counts[w * keys + key] = total;
      total += count;
    }
    first[key] = total;
  }
  __syncthreads();
  if (warp == 0) add_up(first, keys, lane);
  __syncthreads();
  for (int key = threadIdx.x; key < keys; key += blockDim.x) offsets[key] = first[key];
  for (int i = threadIdx.x; i < warps * keys; i += blockDim.x) counts[i] += first[i % keys];
  __syncthreads();
  for_pairs([&](int pair, int key, int rank) { order[mine[key] + rank] = pair; });
}

unsigned blocks_of(std::int64_t images) {
  return static_cast<unsigned>((images + kWarps - 1) / kWarps);
}

}  // namespace

void top_k_routes(const TensorView& scores, const TensorView& index, const TensorView& weight,
                  bool softmax, void* stream) {
  const std::int64_t images = scores.shape[0];
  if (images == 0) return;
  const DeviceGuard guard(scores.device_index);
  dispatch("top_k_routes", scores.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows{scores.as<const T>(), scores.stride[0], scores.stride[1], images,
                       scores.shape[1],      index.shape[1]};
    launch("top_k_routes", top_k_routes_kernel<T>, dim3(blocks_of(images)), dim3(kWarps * kWarp), 0,
           stream, rows, index.as<std::int32_t>(), weight.as<T>(), softmax);
  });
}

void top_k_routes_grad(const TensorView& grad_weight, const TensorView& index,
                       const TensorView& weight, const TensorView& grad_scores, void* stream) {
  const std::int64_t images = index.shape[0];
  if (images == 0) return;
  const DeviceGuard guard(weight.device_index);
  dispatch("top_k_routes_grad", weight.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch("top_k_routes_grad", top_k_routes_grad_kernel<T>, dim3(blocks_of(images)),
           dim3(kWarps * kWarp), 0, stream, grad_weight.as<const T>(),
           index.as<const std::int32_t>(), weight.as<const T>(), grad_scores.as<T>(), images,
           grad_scores.shape[1], index.shape[1]);
  });
}

std::int64_t branch_plan_most_branches() { return kPlanCounters / 2 - 1; }

void branch_plan(const TensorView& index, const TensorView& order, const TensorView& offsets,
                 void* stream) {
  const int pairs = static_cast<int>(order.shape[0]);
  const int branches = static_cast<int>(offsets.shape[0]) - 1;
  const int most = static_cast<int>(kPlanCounters / (branches + 1)) - 1;
  const int warps = std::clamp((pairs + kWarp - 1) / kWarp, 1, std::min(kPlanWarps, most));
  const DeviceGuard guard(index.device_index);
  launch("branch_plan", branch_plan_kernel, dim3(1), dim3(warps * kWarp),
         sizeof(int) * (warps + 1) * (branches + 1), stream, index.as<const std::int32_t>(),
         order.as<std::int32_t>(), offsets.as<std::int32_t>(), pairs, branches);
}

}  // namespace pyeff::cuda
