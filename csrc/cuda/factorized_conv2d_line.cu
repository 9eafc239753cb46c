// One 1-D convolution of factorized_conv2d with its epilogue, and the gradient of its input: the
// same sum over taps and channels, from the pixels of x or from those of the result's gradient.

#include <algorithm>

#include "cuda/factorized_conv2d.cuh"
#include "cuda/launch.cuh"

namespace pyeff::cuda {
namespace {

constexpr int kStages = 3;

// result[n, a, b, o] = epilogue(sum over t and c of source[n, a', b, c] weight[o, c, t]) with
// a' = (a * factor + offset + t * step) / divisor, where that is whole and in the map.
template <typename T>
struct LineProblem {
  LineMap<const T> source;
  LineMap<T> result;
  LineWeight<T> weight;
  LineEpilogue<T> epilogue;
  std::int64_t factor, offset, step, divisor;
  int pixels;       // of all images' results
  bool along_fast;  // pixels are numbered along a first

  __device__ void split(int m, std::int64_t& n, std::int64_t& a, std::int64_t& b) const {
    const int fast = along_fast ? result.A : result.B;
    const int image = result.A * result.B;
    const int within = m % image, slow = within / fast;
    n = m / image;
    a = along_fast ? within - slow * fast : slow;
    b = along_fast ? slow : within - slow * fast;
  }
  // Returns whether the tap meets the map.
  __device__ bool find(std::int64_t start, int tap, std::int64_t& a) const {
    a = start + tap * step;
    if (divisor != 1) {
      if (a % divisor != 0) return false;
      a /= divisor;
    }
    return a >= 0 && a < source.A;
  }
};

// The rows of a block's panels that a thread fetches, the same ones for every tap.
template <typename Tile>
class PixelLoader {
 public:
  using T = typename Tile::Value;

  __device__ PixelLoader(const LineProblem<T>& p, int first_row) : p_(p) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = first_row + row(i);
      rows_[i] = {nullptr, 0};
      if (m >= p.pixels || row(i) >= Tile::kRows) continue;
      std::int64_t n, a, b;
      p.split(m, n, a, b);
      rows_[i] = {p.source.pixel(n, 0, b), a * p.factor + p.offset};
    }
  }

  __device__ void load(T* to, int tap, int channel) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row(i) >= Tile::kRows) continue;
      const int at = static_cast<int>(threadIdx.x) % kChunks * kChunk;
      const T* from = nullptr;
      std::int64_t a;
      if (rows_[i].line != nullptr && p_.find(rows_[i].start, tap, a)) {
        from = rows_[i].line + a * p_.source.along;
      }
      load_chunk(to + row(i) * RowPanel<Tile, Tile::kRows>::kPitch + at, from, p_.source.data,
                 channel + at, p_.source.channels, 1, p_.source.wide);
    }
  }

 private:
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T)), kChunks = Tile::kDepth / kChunk;
  static constexpr int kRows = (Tile::kRows * kChunks + Tile::kThreads - 1) / Tile::kThreads;
  static_assert(Tile::kThreads % kChunks == 0);

  struct Row {
    const T* line;  // null where there is no pixel
    std::int64_t start;
  };

  static __device__ int row(int i) {
    return (static_cast<int>(threadIdx.x) + i * Tile::kThreads) / kChunks;
  }

  const LineProblem<T>& p_;
  Row rows_[kRows];
};

template <typename Tile>
constexpr int kStageElements =
    RowPanel<Tile, Tile::kRows>::kElements + RowPanel<Tile, Tile::kCols>::kElements;

// A block owns kRows pixels by kCols channels of the result and writes them once. Panels of kDepth
// channels of one tap pass through kStages buffers. Deterministic.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    factorized_line_kernel(const __grid_constant__ LineProblem<typename Tile::Value> p) {
  using T = typename Tile::Value;
  using Pixels = RowPanel<Tile, Tile::kRows>;
  T* const shared = shared_memory<T>();
  const int col_blocks = (p.weight.outputs + Tile::kCols - 1) / Tile::kCols;
  const int first_row = static_cast<int>(blockIdx.x) / col_blocks * Tile::kRows;
  const int first_col = static_cast<int>(blockIdx.x) % col_blocks * Tile::kCols;
  const int depths = (p.weight.inputs + Tile::kDepth - 1) / Tile::kDepth;
  const int panels = p.weight.taps * depths;
  const PixelLoader<Tile> pixels(p, first_row);

  Tile tile;
  tile.clear();
  run_stages<kStages>(
      shared, kStageElements<Tile>, panels,
      [&](int panel, T* to) {
        const int tap = panel / depths, channel = panel % depths * Tile::kDepth;
        pixels.load(to, tap, channel);
        load_weights<Tile>(to + Pixels::kElements, p.weight, first_col, tap, channel);
      },
      [&](int, const T* at) {
        tile.multiply(ByRow{at, Pixels::kPitch}, ByRow{at + Pixels::kElements, Pixels::kPitch});
      });

  write_tile(tile, reinterpret_cast<unsigned char*>(shared), p.result, p.epilogue, first_col,
             [&](int row, std::int64_t& n, std::int64_t& a, std::int64_t& b) {
               if (first_row + row >= p.pixels) return false;
               p.split(first_row + row, n, a, b);
               return true;
             });
}

template <typename Tile>
void launch_line(const LineProblem<typename Tile::Value>& p, void* stream) {
  const std::int64_t rows = (std::int64_t{p.pixels} + Tile::kRows - 1) / Tile::kRows;
  const std::int64_t cols = (p.weight.outputs + Tile::kCols - 1) / Tile::kCols;
  const std::size_t panels = kStages * kStageElements<Tile> * sizeof(typename Tile::Value);
  launch("factorized_line_kernel", factorized_line_kernel<Tile>,
         dim3(static_cast<unsigned>(rows * cols)), dim3(Tile::kThreads),
         std::max<std::size_t>(panels, kSumsBytes<Tile>), stream, p);
}

template <typename T>
void run_line(const LineProblem<T>& p, bool tf32, void* stream) {
  if constexpr (sizeof(T) == 8) {
    return launch_line<SimtTile<T>>(p, stream);
  } else {
    if constexpr (sizeof(T) == 4) {
      if (!tf32) return launch_line<SimtTile<T>>(p, stream);
    }
    if (p.weight.outputs <= 16) return launch_line<TensorTile<T, 256, 16, 32>>(p, stream);
    return launch_line<TensorTile<T, 128, 64, 64>>(p, stream);
  }
}

bool is_empty(const TensorView& t) {
  return t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3] == 0;
}

template <typename T>
LineProblem<T> line_problem(const TensorView& source, const TensorView& result, const Line& line,
                            const LineEpilogue<T>& epilogue, bool transposed) {
  return {line_map<const T>(source, line.vertical),
          line_map<T>(result, line.vertical),
          line_weight<T>(line.weight, transposed),
          epilogue,
          1,
          0,
          1,
          1,
          static_cast<int>(result.shape[0] * result.shape[2] * result.shape[3]),
          !line.vertical};
}

}  // namespace

void factorized_conv2d_line_forward(const TensorView& x, const Line& line, const Epilogue& epilogue,
                                    const TensorView& y, const FactorizedConv2d& conv,
                                    void* stream) {
  if (is_empty(y)) return;
  const DeviceGuard guard(y.device_index);
  dispatch("factorized_conv2d_line", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto after = line_epilogue<T>(line.bias, epilogue, x.dtype, line.vertical);
    LineProblem<T> p = line_problem<T>(x, y, line, after, false);
    p.factor = conv.stride;
    p.offset = -conv.padding;
    p.step = conv.dilation;
    run_line(p, conv.tf32, stream);
  });
}

void factorized_conv2d_line_grad_input(const TensorView& grad_y, const Line& line,
                                       const TensorView* before, const TensorView& grad_x,
                                       const FactorizedConv2d& conv, void* stream) {
  if (is_empty(grad_x)) return;
  const DeviceGuard guard(grad_x.device_index);
  dispatch("factorized_conv2d_line_grad_input", grad_y.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Epilogue nothing{nullptr, nullptr, nullptr, Activation::kNone};
    auto after = line_epilogue<T>(nullptr, nothing, grad_y.dtype, line.vertical);
    if (before != nullptr) {
      after.at = line_map<const T>(*before, line.vertical);
      after.through = conv.inner;
    }
    LineProblem<T> p = line_problem<T>(grad_y, grad_x, line, after, true);
    p.offset = conv.padding;
    p.step = -conv.dilation;
    p.divisor = conv.stride;
    run_line(p, conv.tf32, stream);
  });
}

}  // namespace pyeff::cuda
