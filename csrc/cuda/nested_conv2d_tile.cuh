#pragma once
// The tiles of nested_conv2d's products, and how lines of maps and weights come into their panels.

#include "cuda/nested_conv2d.cuh"
#include "cuda/tile.cuh"

namespace pyeff::cuda {

constexpr int kNestedStages = 3;

// As with_tile, or with the large tile where the plan asks for it and there is one.
template <typename T, typename Body>
void with_nested_tile(const NestedConv2dPlan& plan, const Body& body) {
  if constexpr (sizeof(T) <= 4) {
    const bool tensor = sizeof(T) == 2 || plan.tf32;
    if (plan.large && tensor) return body(TypeOf<TensorTile<T, 128, 128, 64, 64>>{});
  }
  with_tile<T>(plan.tf32, body);
}

// Fills the lines of a panel, the threads of a block side by side along a line. source(line) gives
// from(at), the address of a number, or null for zero; `count` of a line exist. With `vector` a
// copy's numbers lie side by side at a multiple of 16 bytes, and all or none of them exist.
template <int kThreads, typename Panel, typename T, typename Source>
__device__ __forceinline__ void fill_lines(T* panel, int count, bool vector, const T* anywhere,
                                           const Source& source) {
  constexpr int kVector = 16 / sizeof(T), kPerLine = Panel::kWidth / kVector;
  static_assert(Panel::kLines * kPerLine % kThreads == 0);
#pragma unroll
  for (int i = 0; i < Panel::kLines * kPerLine / kThreads; ++i) {
    const int slot = i * kThreads + threadIdx.x, line = slot / kPerLine;
    const int at = slot % kPerLine * kVector;
    T* const to = panel + line * Panel::kPitch + at;
    const auto from = source(line);
    if (vector) {
      const T* const address = at < count ? from(at) : nullptr;
      cp_async_16(to, address == nullptr ? anywhere : address, address != nullptr);
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < kVector; ++e) {
      const T* const address = at + e < count ? from(at + e) : nullptr;
      to[e] = address == nullptr ? static_cast<T>(0.0f) : *address;
    }
  }
}

}  // namespace pyeff::cuda
