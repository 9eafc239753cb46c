// Kernels that show what the emulation does with right and with wrong ones.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/tensor_arg.h"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"

namespace pyeff::cuda {
namespace {

constexpr int kWidth = 16;

// y [16, 8] = a [16, 16] b [8, 16]^T by one warp, through cp.async, ldmatrix and mma.
template <typename T>
__global__ void __launch_bounds__(32) product_kernel(const T* a, const T* b, float* y) {
  T* const rows_a = shared_memory<T>();
  T* const rows_b = rows_a + 16 * kWidth;
  const int lane = threadIdx.x;
  cp_async_16(rows_a + lane / 2 * kWidth + lane % 2 * 8, a + lane / 2 * kWidth + lane % 2 * 8,
              true);
  if (lane < 16) {
    cp_async_16(rows_b + lane / 2 * kWidth + lane % 2 * 8, b + lane / 2 * kWidth + lane % 2 * 8,
                true);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  std::uint32_t fragment_a[4], twice_b[4];
  ldmatrix_x4(fragment_a, rows_a + lane % 16 * kWidth + lane / 16 * 8);
  ldmatrix_x4(twice_b, rows_b + lane % 8 * kWidth + lane / 8 % 2 * 8);
  const std::uint32_t fragment_b[2] = {twice_b[0], twice_b[1]};
  float sum[4] = {};
  mma(sum, fragment_a, fragment_b, T{});
  for (int i = 0; i < 4; ++i) y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

__global__ void tf32_product_kernel(const float* a, const float* b, float* y) {
  const int q = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[4] = {};
  for (int k = 0; k < kWidth; k += 8) {
    const std::uint32_t fragment_a[4] = {
        to_tf32(a[q * kWidth + k + t]), to_tf32(a[(q + 8) * kWidth + k + t]),
        to_tf32(a[q * kWidth + k + t + 4]), to_tf32(a[(q + 8) * kWidth + k + t + 4])};
    const std::uint32_t fragment_b[2] = {to_tf32(b[q * kWidth + k + t]),
                                         to_tf32(b[q * kWidth + k + t + 4])};
    mma_tf32(sum, fragment_a, fragment_b);
  }
  for (int i = 0; i < 4; ++i) y[(q + i / 2 * 8) * 8 + t * 2 + i % 2] = sum[i];
}

// y[i] = the sum of x over the block, if each step waits as it should. `fault` leaves one out.
enum Fault { kNone, kNoWait, kNoBarrier, kDivergent, kEarlyEnd, kBeyond, kWarp, kMask };

__global__ void fault_kernel(const float* x, float* y, int fault) {
  float* const values = shared_memory<float>();
  const int t = threadIdx.x, threads = blockDim.x;
  cp_async<4>(values + t, x + t, true);
  cp_async_commit();
  if (fault != kNoWait) cp_async_wait<0>();
  if (fault == kEarlyEnd && t == 3) return;
  if (fault == kDivergent && t < 32) {
    __syncthreads();
  } else if (fault != kNoBarrier) {
    __syncthreads();
  }
  if (fault == kBeyond) values[threads + t] = 0.0f;
  if (fault == kWarp && t % 32 < 16) __syncwarp();
  if (fault == kMask) __syncwarp(1u);
  float sum = 0.0f;
  for (int i = 0; i < threads; ++i) sum += values[i];
  y[t] = sum;
}

// The last thread goes on alone and overwrites what the others still read, without a barrier.
__global__ void overwrite_kernel(const float* x, float* y) {
  float* const values = shared_memory<float>();
  const int t = threadIdx.x, threads = blockDim.x;
  values[t] = x[t];
  __syncthreads();
  y[t] = values[(t + 1) % threads];
  values[t] = 0.0f;
}

}  // namespace

void product(const TensorView& a, const TensorView& b, const TensorView& y, void* stream) {
  if (a.dtype == Dtype::kFloat32) {
    return launch("tf32_product", tf32_product_kernel, dim3(1), dim3(32), 0, stream,
                  a.as<const float>(), b.as<const float>(), y.as<float>());
  }
  dispatch("product", a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      launch("product", product_kernel<T>, dim3(1), dim3(32), 24 * kWidth * sizeof(T), stream,
             a.as<const T>(), b.as<const T>(), y.as<float>());
    }
  });
}

void faulty(const TensorView& x, const TensorView& y, int fault, std::size_t shared_bytes,
            void* stream) {
  const dim3 block(static_cast<unsigned>(x.shape[0]));
  launch("faulty", fault_kernel, dim3(1), block, shared_bytes, stream, x.as<const float>(),
         y.as<float>(), fault);
}

void overwrite(const TensorView& x, const TensorView& y, void* stream) {
  const unsigned threads = static_cast<unsigned>(x.shape[0]);
  launch("overwrite", overwrite_kernel, dim3(1), dim3(threads), threads * sizeof(float), stream,
         x.as<const float>(), y.as<float>());
}

}  // namespace pyeff::cuda

namespace pyeff::bindings {

void bind_probe(py::module_& m) {
  m.def("product", [](py::handle a_, py::handle b_, py::handle y_) {
    const TensorArg a(a_, "a"), b(b_, "b"), y(y_, "y");
    cuda::product(a, b, y, a.current_stream());
  });
  m.def("faulty", [](py::handle x_, py::handle y_, int fault, std::size_t shared_bytes) {
    const TensorArg x(x_, "x"), y(y_, "y");
    cuda::faulty(x, y, fault, shared_bytes, x.current_stream());
  });
  m.def("overwrite", [](py::handle x_, py::handle y_) {
    const TensorArg x(x_, "x"), y(y_, "y");
    cuda::overwrite(x, y, x.current_stream());
  });
}

}  // namespace pyeff::bindings
