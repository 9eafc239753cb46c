// branch_stage: a persistent kernel. A block runs the whole branch of one (image, branch) pair
// after the other, with every map in its shared memory: x is read and y is written once, and the
// weights come from the second-level cache.

#include "pyeff/branch_stage.h"

#include <algorithm>
#include <type_traits>

#include "cuda/branch_stage_conv.cuh"
#include "cuda/branch_stage_layout.h"
#include "cuda/branch_stage_point.cuh"
#include "cuda/common.cuh"
#include "cuda/launch.cuh"

// The kernel's parameters are some 9 KB.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
#error "branch_stage.cu: nvcc must be 12.1 or newer"
#endif

namespace pyeff::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct StageTensors {
  const T* x;
  std::int64_t x_image, x_route, x_row, x_pixel;  // strides; x_route is 0 where routes share x
  const std::int32_t* index;                      // [N, k]
  const T* weights;                               // [B, weights of a branch]
  const acc_t<T>* vectors;                        // [B, vectors of a branch]
  T* y;                                           // [N, k, rows, cols, channels]
  std::int64_t pairs, k;
};

template <typename T>
constexpr bool kHasMatrix = std::is_same_v<acc_t<T>, float> && !std::is_same_v<T, float>;

template <typename T>
__device__ void convolve(const StageTasks& run, const StageTask& task, T* maps, const T* weights,
                         const acc_t<T>* bias) {
  const StageSlot& x = run.slots[task.source];
  const StageResult<T> result{task, run.slots[task.result],
                              task.second < 0 ? nullptr : &run.slots[task.second], maps};
  if constexpr (kHasMatrix<T>) {
    if (task.op == StageOp::kMatrixConv) {
      // Two tiles share what is read of the pixels, where one would not keep more warps busy.
      const int tiles = (result.y.rows * result.y.cols + 15) / 16 *
                        ((result.y.channels + kMatrixLanes - 1) / kMatrixLanes);
      if (tiles > kThreads / 32) {
        matrix_conv<T, 2>(result, x, weights, bias);
      } else {
        matrix_conv<T, 1>(result, x, weights, bias);
      }
      return;
    }
  }
  if (task.groups == 1) {
    direct_conv<T, kDirectLanes>(result, x, weights, bias);
  } else {
    direct_conv<T, 1>(result, x, weights, bias);
  }
}

template <typename T>
__device__ void run_task(const StageTasks& run, const StageTask& task, T* maps, const T* weights,
                         const acc_t<T>* vectors) {
  const StageSlot &x = run.slots[task.source], &y = run.slots[task.result];
  if (task.fresh) write_zeros(y, maps);
  weights += task.weights;
  vectors += task.vectors;
  switch (task.op) {
    case StageOp::kMatrixConv:
    case StageOp::kDirectConv:
      return convolve(run, task, maps, weights, vectors);
    case StageOp::kScaleShift:
      return scale_shift(task, x, y, maps, vectors);
    case StageOp::kAdd:
      return add(task, x, run.slots[task.second], y, maps);
    case StageOp::kCopy:
      return copy_channels(task, x, y, maps);
    case StageOp::kPool:
      return pool(task, x, y, maps);
    case StageOp::kFlatten:
      return flatten(task, x, y, maps);
  }
}

// y[n, j] = branch index[n, j] of x[n] (or x[n, j]), zeros where there is no such branch. The same
// on every run: every element of every map has one thread.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    branch_stage_kernel(const __grid_constant__ StageTasks run,
                        const __grid_constant__ StageTensors<T> tensors) {
  T* const maps = shared_memory<T>();
  const StageSlot &input = run.slots[0], &output = run.slots[run.output];
  const std::int64_t y_elements = std::int64_t{output.rows} * output.cols * output.channels;
  for (std::int64_t pair = blockIdx.x; pair < tensors.pairs; pair += gridDim.x) {
    const std::int32_t branch = tensors.index[pair];
    const bool exists = branch >= 0 && branch < run.branches;
    T* const y = tensors.y + pair * y_elements;
    if (!exists) {
      for (std::int64_t i = threadIdx.x; i < y_elements; i += kThreads) {
        y[i] = static_cast<T>(0.0f);
      }
      continue;
    }
    const T* const x =
        tensors.x + pair / tensors.k * tensors.x_image + pair % tensors.k * tensors.x_route;
    write_zeros(input, maps);
    for_elements(input, input.channels, [&](int r, int c, int l) {
      maps[pixel_at(input, r, c) + l] = x[r * tensors.x_row + c * tensors.x_pixel + l];
    });
    __syncthreads();
    for (int t = 0; t < run.task_count; ++t) {
      run_task(run, run.tasks[t], maps, tensors.weights + branch * run.weights,
               tensors.vectors + branch * run.vectors);
      __syncthreads();
    }
    for_elements(output, output.channels, [&](int r, int c, int l) {
      y[(r * output.cols + c) * output.channels + l] = maps[pixel_at(output, r, c) + l];
    });
    __syncthreads();
  }
}

template <typename T>
StageTensors<T> tensors_of(const StageProgram& program, const TensorView& x,
                           const TensorView& index, const TensorView& weights,
                           const TensorView& vectors, const TensorView& y) {
  const int last = x.ndim - 1;
  const bool per_pair = x.ndim == (program.vector ? 3 : 5);
  return {x.as<const T>(),
          x.stride[0],
          per_pair ? x.stride[1] : 0,
          program.vector ? 0 : x.stride[last - 1],
          program.vector ? 0 : x.stride[last],
          index.as<const std::int32_t>(),
          weights.as<const T>(),
          vectors.as<const acc_t<T>>(),
          y.as<T>(),
          index.shape[0] * index.shape[1],
          index.shape[1]};
}

}  // namespace

std::int64_t branch_stage_most_shared_bytes(int device_index) {
  const DeviceGuard guard(device_index);
  return static_cast<std::int64_t>(most_shared_bytes());
}

void branch_stage_forward(const StageProgram& program, const TensorView& x, const TensorView& index,
                          const TensorView& weights, const TensorView& vectors, const TensorView& y,
                          void* stream) {
  const std::int64_t pairs = index.shape[0] * index.shape[1];
  if (pairs == 0) return;
  StageTasks tasks;
  const bool map = !program.vector;
  const std::int64_t shared = lay_out_stage(program, map ? x.shape[x.ndim - 2] : 1,
                                            map ? x.shape[x.ndim - 1] : 1, x.dtype, tasks);
  const DeviceGuard guard(x.device_index);
  dispatch("branch_stage", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = branch_stage_kernel<T>;
    const auto blocks = std::min<std::int64_t>(
        pairs, resident_blocks("branch_stage", kernel, kThreads, static_cast<std::size_t>(shared)));
    launch("branch_stage", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
           static_cast<std::size_t>(shared), stream, tasks,
           tensors_of<T>(program, x, index, weights, vectors, y));
  });
}

}  // namespace pyeff::cuda
