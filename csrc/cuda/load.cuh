#pragma once
// Sixteen bytes at a time from a tensor into shared memory.

#include <cstdint>

#include "cuda/common.cuh"
#include "cuda/warp.cuh"

namespace pyeff::cuda {

// Whether sixteen bytes at once can be read from `first`, a number of t, on, wherever the indices
// are multiples of as many; `side` is the dimension whose elements lie side by side.
template <typename T>
bool aligned(const T* first, const TensorView& t, int side) {
  bool result = reinterpret_cast<std::uintptr_t>(first) % 16 == 0;
  for (int d = 0; d < t.ndim; ++d) {
    // The stride of a dimension of one element may be anything.
    const bool matters = t.shape[d] > 1 && d != side;
    if (matters && t.stride[d] * sizeof(T) % 16 != 0) result = false;
  }
  return result;
}

// Whether so many numbers are a multiple of sixteen bytes.
template <typename T>
constexpr bool fills_chunks(std::int64_t count) {
  return count * sizeof(T) % 16 == 0;
}

// The sixteen bytes from `channel` on; zeros past the channels and where `from` is null. `step` is
// the distance between channels, 1 where it is `wide`; `any` an address that can be read.
template <typename T>
__device__ void load_chunk(T* to, const T* from, const T* any, int channel, int channels,
                           std::int64_t step, bool wide) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  if (wide) {
    const bool valid = from != nullptr && channel < channels;
    cp_async_16(to, valid ? from + channel : any, valid);
    return;
  }
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const bool valid = from != nullptr && channel + e < channels;
    to[e] = valid ? from[(channel + e) * step] : static_cast<T>(0.0f);
  }
}

}  // namespace pyeff::cuda
