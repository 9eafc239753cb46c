#pragma once
// What the kernels of factorized_conv2d have in common: maps, weights, epilogues, and how panels of
// them come into shared memory.
//
// Taps run along axis a of a map, which is its height or its width; the other axis is b.

#include "cuda/activation.cuh"
#include "cuda/load.cuh"
#include "cuda/tile.cuh"
#include "pyeff/factorized_conv2d.h"

namespace pyeff::cuda {

// [N, A, B, channels] by its strides, the channels side by side.
template <typename T>
struct LineMap {
  T* data;
  std::int64_t image, along, across;
  int A, B, channels;
  bool wide;  // every pixel is aligned to 16 bytes and has a multiple of 16 bytes of channels

  __device__ T* pixel(std::int64_t n, std::int64_t a, std::int64_t b) const {
    return data + n * image + a * along + b * across;
  }
};

template <typename T>
LineMap<T> line_map(const TensorView& t, bool along_height) {
  const int a = along_height ? 2 : 3, b = 5 - a;
  const bool wide = aligned(t.as<T>(), t, 1) && fills_chunks<T>(t.shape[1]);
  return {t.as<T>(),
          t.stride[0],
          t.stride[a],
          t.stride[b],
          static_cast<int>(t.shape[a]),
          static_cast<int>(t.shape[b]),
          static_cast<int>(t.shape[1]),
          wide};
}

template <typename T>
LineMap<T> no_map() {
  return {nullptr, 0, 0, 0, 0, 0, 0, false};
}

// weight[output, input, tap] by its strides; outputs and inputs as the product has them.
template <typename T>
struct LineWeight {
  const T* data;
  std::int64_t output, input, tap;
  int outputs, inputs, taps;
  bool wide;
};

// For the gradient of a line's input outputs and inputs change places.
template <typename T>
LineWeight<T> line_weight(const TensorView& t, bool transposed) {
  const int o = transposed ? 1 : 0, i = 1 - o, tap = t.shape[2] > 1 ? 2 : 3;
  const bool wide = (t.stride[i] == 1 || t.shape[i] == 1) && aligned(t.as<const T>(), t, i) &&
                    fills_chunks<T>(t.shape[i]);
  return {t.as<const T>(),
          t.stride[o],
          t.stride[i],
          t.stride[tap],
          static_cast<int>(t.shape[o]),
          static_cast<int>(t.shape[i]),
          static_cast<int>(t.shape[2] * t.shape[3]),
          wide};
}

// One number a channel, of the maps' type or float; none where both are null.
template <typename T>
struct ChannelVector {
  const T* same;
  const float* single;

  __device__ bool exists() const { return same != nullptr || single != nullptr; }
  __device__ acc_t<T> at(int channel) const {
    return same != nullptr ? static_cast<acc_t<T>>(same[channel])
                           : static_cast<acc_t<T>>(single[channel]);
  }
};

template <typename T>
ChannelVector<T> channel_vector(const TensorView* t, Dtype maps) {
  if (t == nullptr) return {nullptr, nullptr};
  if (t->dtype == maps) return {t->as<const T>(), nullptr};
  return {nullptr, t->as<const float>()};
}

// y = f'(at) f(scale * (sum + bias) + shift + residual); what is null is left out.
template <typename T>
struct LineEpilogue {
  ChannelVector<T> bias, scale, shift;
  LineMap<const T> residual, at;
  Activation activation, through;

  __device__ acc_t<T> operator()(acc_t<T> sum, int channel, T residual_here, T at_here) const {
    if (bias.exists()) sum += bias.at(channel);
    if (scale.exists()) sum *= scale.at(channel);
    if (shift.exists()) sum += shift.at(channel);
    if (residual.data != nullptr) sum += static_cast<acc_t<T>>(residual_here);
    sum = activated(sum, activation);
    if (at.data == nullptr) return sum;
    return through_activation(sum, static_cast<acc_t<T>>(at_here), through);
  }
};

template <typename T>
LineEpilogue<T> line_epilogue(const TensorView* bias, const Epilogue& e, Dtype maps,
                              bool along_height) {
  return {channel_vector<T>(bias, maps),
          channel_vector<T>(e.scale, maps),
          channel_vector<T>(e.shift, maps),
          e.residual == nullptr ? no_map<const T>() : line_map<const T>(*e.residual, along_height),
          no_map<const T>(),
          e.activation,
          Activation::kNone};
}

// Sixteen bytes of a pixel from `channel` on; only what exists is read.
template <typename T>
__device__ Run<T, 16 / sizeof(T)> read_chunk(const LineMap<const T>& map, std::int64_t n,
                                             std::int64_t a, std::int64_t b, int channel) {
  using Chunk = Run<T, 16 / sizeof(T)>;
  if (map.data == nullptr) return Chunk{};
  const T* const from = map.pixel(n, a, b) + channel;
  if (map.wide) return *reinterpret_cast<const Chunk*>(from);
  Chunk chunk{};
#pragma unroll
  for (int e = 0; e < 16 / static_cast<int>(sizeof(T)); ++e) {
    if (channel + e < map.channels) chunk.v[e] = from[e];
  }
  return chunk;
}

// The epilogue of a block's tile, and its only write. The sums pass through shared memory, so that
// neighbours write neighbouring channels. place(row, n, a, b) says which pixel a row is, or false.
template <typename Tile, typename Place>
__device__ void write_tile(const Tile& tile, unsigned char* shared,
                           const LineMap<typename Tile::Value>& y,
                           const LineEpilogue<typename Tile::Value>& epilogue, int first_col,
                           const Place& place) {
  using T = typename Tile::Value;
  constexpr int kChunk = 16 / sizeof(T), kChunks = Tile::kCols / kChunk;
  constexpr int kPitch = Tile::kSumsPitch;
  auto* const sums = reinterpret_cast<acc_t<T>*>(shared);
  __syncthreads();  // the panels have been read
  tile.each([&](int row, int col, const auto& v) {
    using Sums = Run<acc_t<T>, Tile::kRun>;
    Sums both;
#pragma unroll
    for (int e = 0; e < Tile::kRun; ++e) both.v[e] = v[e];
    *reinterpret_cast<Sums*>(sums + row * kPitch + col) = both;
  });
  __syncthreads();
  for (int i = threadIdx.x; i < Tile::kRows * kChunks; i += Tile::kThreads) {
    const int row = i / kChunks, col = i % kChunks * kChunk, channel = first_col + col;
    std::int64_t n, a, b;
    if (channel >= y.channels || !place(row, n, a, b)) continue;
    const auto residual = read_chunk(epilogue.residual, n, a, b, channel);
    const auto at = read_chunk(epilogue.at, n, a, b, channel);
    Run<T, kChunk> values;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      if (channel + e >= y.channels) break;
      values.v[e] = static_cast<T>(
          epilogue(sums[row * kPitch + col + e], channel + e, residual.v[e], at.v[e]));
    }
    T* const to = y.pixel(n, a, b) + channel;
    if (y.wide) {
      *reinterpret_cast<Run<T, kChunk>*>(to) = values;
      continue;
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      if (channel + e < y.channels) to[e] = values.v[e];
    }
  }
}

// Bytes that write_tile needs.
template <typename Tile>
constexpr std::int64_t kSumsBytes =
    Tile::kRows * Tile::kSumsPitch * std::int64_t{sizeof(acc_t<typename Tile::Value>)};

// Columns first_col and on of a weight, kDepth of its inputs from `channel` on, for Tile::multiply.
template <typename Tile>
__device__ void load_weights(typename Tile::Value* to, const LineWeight<typename Tile::Value>& w,
                             int first_col, int tap, int channel) {
  using T = typename Tile::Value;
  constexpr int kChunk = 16 / sizeof(T), kChunks = Tile::kDepth / kChunk;
  for (int i = threadIdx.x; i < Tile::kCols * kChunks; i += Tile::kThreads) {
    const int col = i / kChunks, at = i % kChunks * kChunk, output = first_col + col;
    const T* const from = output < w.outputs ? w.data + output * w.output + tap * w.tap : nullptr;
    load_chunk(to + col * RowPanel<Tile, Tile::kCols>::kPitch + at, from, w.data, channel + at,
               w.inputs, w.input, w.wide);
  }
}

}  // namespace pyeff::cuda
