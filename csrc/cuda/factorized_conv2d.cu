// factorized_conv2d forward with both convolutions in one kernel: the input with its halo and then
// the map between the two lie in shared memory.
//
// The second convolution's taps run along axis a, the first one's along axis b. Only every
// dilation-th row and column matter to a pixel: a block works on a *comb* of them, on which every
// dilation is 1, so that the halo is as small for a dilation of 16 as for none. On the comb a tile
// has `lines` rows (b) of `width` pixels (a) in the middle map; the input has taps - 1 lines more,
// the result taps - 1 columns less. Pixels are numbered along the rows through all of the tile, so
// that a tap is a shift of that number by `width`, or by one.

#include "cuda/factorized_conv2d.cuh"

#include <algorithm>

#include "cuda/launch.cuh"

namespace pyeff::cuda {
namespace {

constexpr int kStages = 3;
// What a block can have on every device from sm_80 on.
constexpr std::int64_t kSharedBytes = 99 * 1024;

struct PairTile {
  int lines, width;  // of the middle map
  int comb_b, comb_a, tiles_b, tiles_a;
  std::int64_t blocks;  // of an image; 0 where no tile fits
};

template <typename T>
struct PairProblem {
  LineMap<const T> x;
  LineMap<T> y;
  LineWeight<T> first, second;
  ChannelVector<T> b_first;
  LineEpilogue<T> epilogue;
  Activation inner;
  std::int64_t padding, dilation;
  PairTile tile;
};

// Elements between the pixels of a map of that many channels in shared memory.
template <typename Tile>
__host__ __device__ constexpr int map_pitch(int channels) {
  return (channels + Tile::kDepth - 1) / Tile::kDepth * Tile::kDepth + Tile::kPad;
}

// Of the region that first holds the input and then the middle map. Rows past the tile's last pixel
// are read, for sums that nobody keeps.
template <typename Tile>
__host__ __device__ constexpr int map_elements(int inputs, int middle, int taps, int width) {
  const int x = (Tile::kRows + (taps - 1) * width) * map_pitch<Tile>(inputs);
  const int v = (Tile::kRows + taps - 1) * map_pitch<Tile>(middle);
  return x > v ? x : v;
}

template <typename Tile>
constexpr int kStageElements = RowPanel<Tile, Tile::kCols>::kElements;

// Where a block's tile lies: pixel (line i, column k) of the middle map is b0 + i * dilation,
// a0 + k * dilation of the result and, less the padding, the same on the axes of x.
struct Place {
  std::int64_t n, b0, a0;

  __device__ Place(const PairTile& t, int outputs_of_a_line, std::int64_t dilation) {
    std::int64_t rest = blockIdx.x;
    n = rest / t.blocks;
    rest -= n * t.blocks;
    const int tile_a = static_cast<int>(rest % t.tiles_a);
    rest /= t.tiles_a;
    const int tile_b = static_cast<int>(rest % t.tiles_b);
    rest /= t.tiles_b;
    const int comb_a = static_cast<int>(rest % t.comb_a),
              comb_b = static_cast<int>(rest / t.comb_a);
    b0 = comb_b + tile_b * t.lines * dilation;
    a0 = comb_a + tile_a * outputs_of_a_line * dilation;
  }
};

template <typename Tile>
__device__ void load_input(typename Tile::Value* to, const PairProblem<typename Tile::Value>& p,
                           const Place& place) {
  using T = typename Tile::Value;
  constexpr int kChunk = 16 / sizeof(T);
  const int pitch = map_pitch<Tile>(p.x.channels), chunks = (pitch - Tile::kPad) / kChunk;
  const int pixels = (p.tile.lines + p.first.taps - 1) * p.tile.width;
  for (int i = threadIdx.x; i < pixels * chunks; i += Tile::kThreads) {
    const int pixel = i / chunks, at = (i - pixel * chunks) * kChunk;
    const int line = pixel / p.tile.width, column = pixel - line * p.tile.width;
    const std::int64_t b = place.b0 + line * p.dilation - p.padding;
    const std::int64_t a = place.a0 + column * p.dilation - p.padding;
    const bool inside = b >= 0 && b < p.x.B && a >= 0 && a < p.x.A;
    load_chunk(to + pixel * pitch + at, inside ? p.x.pixel(place.n, a, b) : nullptr, p.x.data, at,
               p.x.channels, 1, p.x.wide);
  }
}

// v = inner(sums + b_first), zero outside of its map as the second convolution wants it, and zero
// in the channels that only fill a panel.
template <typename Tile>
__device__ void store_middle(typename Tile::Value* to, const Tile& tile,
                             const PairProblem<typename Tile::Value>& p, const Place& place) {
  using T = typename Tile::Value;
  using A = acc_t<T>;
  const int pitch = map_pitch<Tile>(p.second.inputs);
  tile.each([&](int row, int col, const auto& sums) {
    if (col >= pitch - Tile::kPad) return;
    const std::int64_t a = place.a0 + row % p.tile.width * p.dilation - p.padding;
    const bool inside = a >= 0 && a < p.x.A;
    Run<T, Tile::kRun> values;
#pragma unroll
    for (int e = 0; e < Tile::kRun; ++e) {
      A value = sums[e];
      if (p.b_first.exists() && col + e < p.first.outputs) value += p.b_first.at(col + e);
      value = activated(value, p.inner);
      values.v[e] = static_cast<T>(inside && col + e < p.first.outputs ? value : A(0));
    }
    *reinterpret_cast<Run<T, Tile::kRun>*>(to + row * pitch + col) = values;
  });
}

// y = epilogue(second(inner(first(x) + b_first))). A block owns a tile of one image, all channels
// of it. It reads the tile of x once; the weights of both convolutions pass, one panel of kDepth
// channels of one tap after the other, through kStages buffers. Deterministic.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    factorized_pair_kernel(const __grid_constant__ PairProblem<typename Tile::Value> p) {
  using T = typename Tile::Value;
  constexpr int kPitch = RowPanel<Tile, Tile::kCols>::kPitch;
  const int taps = p.first.taps, width = p.tile.width;
  const Place place(p.tile, width - taps + 1, p.dilation);
  if (place.b0 >= p.y.B || place.a0 >= p.y.A) return;  // the whole block: a short comb
  T* const map = shared_memory<T>();
  T* const stages = map + map_elements<Tile>(p.first.inputs, p.second.inputs, taps, width);
  const int first_depths = (p.first.inputs + Tile::kDepth - 1) / Tile::kDepth;
  const int second_depths = (p.second.inputs + Tile::kDepth - 1) / Tile::kDepth;
  const int turn = taps * first_depths, panels = turn + taps * second_depths;
  const int x_pitch = map_pitch<Tile>(p.first.inputs), v_pitch = map_pitch<Tile>(p.second.inputs);

  Tile tile;
  tile.clear();
  load_input<Tile>(map, p, place);  // comes with the first panel
  run_stages<kStages>(
      stages, kStageElements<Tile>, panels,
      [&](int panel, T* to) {
        const bool begins = panel < turn;
        const int rest = begins ? panel : panel - turn,
                  depths = begins ? first_depths : second_depths;
        load_weights<Tile>(to, begins ? p.first : p.second, 0, rest / depths,
                           rest % depths * Tile::kDepth);
      },
      [&](int panel, const T* weights) {
        if (panel == turn) {  // nobody reads x any more
          store_middle(map, tile, p, place);
          tile.clear();
          __syncthreads();
        }
        const bool begins = panel < turn;
        const int rest = begins ? panel : panel - turn,
                  depths = begins ? first_depths : second_depths;
        const int shift = begins ? width * x_pitch : v_pitch;
        const T* const from = map + rest / depths * shift + rest % depths * Tile::kDepth;
        tile.multiply(ByRow{from, begins ? x_pitch : v_pitch}, ByRow{weights, kPitch});
      });
  write_tile(tile, reinterpret_cast<unsigned char*>(map), p.y, p.epilogue, 0,
             [&](int row, std::int64_t& n, std::int64_t& a, std::int64_t& b) {
               const int line = row / width, column = row - line * width;
               n = place.n;
               a = place.a0 + column * p.dilation;
               b = place.b0 + line * p.dilation;
               return line < p.tile.lines && column <= width - taps && a < p.y.A && b < p.y.B;
             });
}

template <typename Tile>
std::int64_t shared_bytes(const Line& first, int width) {
  const auto& shape = first.weight.shape;
  const int taps = static_cast<int>(shape[2] * shape[3]);
  const int elements =
      map_elements<Tile>(static_cast<int>(shape[1]), static_cast<int>(shape[0]), taps, width) +
      kStages * kStageElements<Tile>;
  return std::max(elements * std::int64_t{sizeof(typename Tile::Value)}, kSumsBytes<Tile>);
}

// The tile with the least work for all of the image: products, and pixels of x that it reads.
template <typename Tile>
PairTile choose_tile(const Line& first, std::int64_t A, std::int64_t B, std::int64_t dilation) {
  const auto& shape = first.weight.shape;
  PairTile best{};
  const std::int64_t taps = shape[2] * shape[3], size = sizeof(typename Tile::Value);
  // Most maps that cannot fit would not fit the numbers below either.
  if (taps > Tile::kRows || shape[1] * Tile::kRows * size > kSharedBytes) return best;
  const std::int64_t comb_a = std::min(A, dilation), comb_b = std::min(B, dilation);
  const std::int64_t teeth_a = (A + dilation - 1) / dilation,
                     teeth_b = (B + dilation - 1) / dilation;
  std::int64_t least = 0;
  for (std::int64_t lines = 1; lines <= std::min<std::int64_t>(teeth_b, Tile::kRows); ++lines) {
    const std::int64_t width = std::min(Tile::kRows / lines, teeth_a + taps - 1);
    const std::int64_t kept = width - taps + 1;
    if (kept < 1 || shared_bytes<Tile>(first, static_cast<int>(width)) > kSharedBytes) continue;
    const std::int64_t tiles_a = (teeth_a + kept - 1) / kept,
                       tiles_b = (teeth_b + lines - 1) / lines;
    const std::int64_t blocks = tiles_a * tiles_b * comb_a * comb_b;
    const std::int64_t work = blocks * (2 * taps * Tile::kRows + (lines + taps - 1) * width);
    if (best.blocks > 0 && work >= least) continue;
    least = work;
    best = {static_cast<int>(lines),
            static_cast<int>(width),
            static_cast<int>(comb_b),
            static_cast<int>(comb_a),
            static_cast<int>(tiles_b),
            static_cast<int>(tiles_a),
            blocks};
  }
  return best;
}

// Calls body(TypeOf<Tile>{}) for the narrowest tile that has all channels of both convolutions;
// without one it returns false.
template <typename T, typename Body>
bool with_pair_tile(std::int64_t channels, bool tf32, const Body& body) {
  if (sizeof(T) == 8 || (sizeof(T) == 4 && !tf32)) {
    if constexpr (sizeof(T) >= 4) return channels <= 64 && body(TypeOf<SimtTile<T>>{});
  }
  if constexpr (sizeof(T) <= 4) {
    if (channels <= 16) return body(TypeOf<TensorTile<T, 256, 16, 32>>{});
    if (channels <= 64) return body(TypeOf<TensorTile<T, 128, 64, 64>>{});
    return channels <= 128 && body(TypeOf<TensorTile<T, 64, 128, 64>>{});
  }
  return false;
}

template <typename Tile>
bool run_pair(const TensorView& x, const Line& first, const Line& second, const Epilogue& epilogue,
              const TensorView& y, const FactorizedConv2d& conv, void* stream) {
  using T = typename Tile::Value;
  const bool height = second.vertical;
  PairProblem<T> p{line_map<const T>(x, height),
                   line_map<T>(y, height),
                   line_weight<T>(first.weight, false),
                   line_weight<T>(second.weight, false),
                   channel_vector<T>(first.bias, x.dtype),
                   line_epilogue<T>(second.bias, epilogue, x.dtype, height),
                   conv.inner,
                   conv.padding,
                   conv.dilation,
                   {}};
  p.tile = choose_tile<Tile>(first, p.y.A, p.y.B, conv.dilation);
  if (p.tile.blocks == 0) return false;
  const auto grid = static_cast<unsigned>(y.shape[0] * p.tile.blocks);
  launch("factorized_pair_kernel", factorized_pair_kernel<Tile>, dim3(grid), dim3(Tile::kThreads),
         static_cast<std::size_t>(shared_bytes<Tile>(first, p.tile.width)), stream, p);
  return true;
}

}  // namespace

bool factorized_conv2d_fits(const Line& first, const Line& second, const TensorView& y,
                            const FactorizedConv2d& conv) {
  if (conv.stride != 1) return false;
  const int a = second.vertical ? 2 : 3;
  const std::int64_t channels = std::max(first.weight.shape[0], second.weight.shape[0]);
  bool fits = false;
  dispatch("factorized_conv2d", y.dtype, [&](auto zero) {
    fits = with_pair_tile<decltype(zero)>(channels, conv.tf32, [&](auto type) {
      using Tile = typename decltype(type)::type;
      return choose_tile<Tile>(first, y.shape[a], y.shape[5 - a], conv.dilation).blocks > 0;
    });
  });
  return fits;
}

void factorized_conv2d_forward(const TensorView& x, const Line& first, const Line& second,
                               const Epilogue& epilogue, const TensorView& y,
                               const FactorizedConv2d& conv, void* stream) {
  if (y.shape[0] * y.shape[1] * y.shape[2] * y.shape[3] == 0) return;
  const DeviceGuard guard(y.device_index);
  const std::int64_t channels = std::max(first.weight.shape[0], second.weight.shape[0]);
  dispatch("factorized_conv2d", x.dtype, [&](auto zero) {
    with_pair_tile<decltype(zero)>(channels, conv.tf32, [&](auto type) {
      return run_pair<typename decltype(type)::type>(x, first, second, epilogue, y, conv, stream);
    });
  });
}

}  // namespace pyeff::cuda
