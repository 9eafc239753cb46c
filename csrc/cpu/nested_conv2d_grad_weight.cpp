// nested_conv2d, gradient of the full weight:
//   gW[o, i, u, v] = sum_{n, h, w} gy[n, o, h, w] x[n, i, h s + u d - p, w s + v d - p]
// for selected o and i, exactly zero elsewhere. A unit of work is a block of input channels times a
// panel of 32 output channels at one kernel position; its sums belong to one thread, which adds the
// pixels in the same order whatever the number of threads.

#include "cpu/nested_conv2d_kernels.h"
#include "cpu/nested_conv2d_types.h"
#include "cpu/panels.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Some cell rows: several whole images, or part of one.
struct Chunk {
  Index n, images, row, rows;
};

// sums[unit][kTilePixels][kPanel]; the same tile as in the forward pass, with pixels as the sum.
struct DenseUnits {
  static constexpr Index kBlock = kTilePixels;  // input channels of a unit

  static Index channel_blocks(Index channels) { return ceil_div(channels, kBlock); }
  static Index unit_elements() { return kTilePixels * kPanel; }

  template <typename A>
  static void add(const Tap<A>* rows, Index row_count, Index x_step, Index x_offset, Index channels,
                  int lanes, A* sums) {
    TileCall<A> call{};
    call.taps = rows;
    call.tap_count = row_count;
    call.a_offset = x_offset;
    call.a_pixel = 1;
    call.a_step = x_step;
    call.b_step = call.out_pixel = kPanel;
    const int vecs = (lanes + kLanes<A> - 1) / kLanes<A>;
    for (int v = 0; v < vecs; v += kTileVecs) {
      call.b_offset = v * kLanes<A>;
      call.out = sums + call.b_offset;
      run_tile<DenseTile>(static_cast<int>(channels),
                          static_cast<int>(smaller(kTileVecs, vecs - v)), call);
    }
  }
};

// sums[unit][kPanel]: channel c of x meets channel c of gy only.
struct DepthwiseUnits {
  static constexpr Index kBlock = kPanel;

  static Index channel_blocks(Index) { return 1; }
  static Index unit_elements() { return kPanel; }

  template <typename A>
  static void add(const Tap<A>* rows, Index row_count, Index x_step, Index x_offset, Index,
                  int lanes, A* sums) {
    constexpr int kChains = 4;  // independent sums, to hide the latency of the addition
    for (int lane = 0; lane < lanes; lane += kLanes<A>) {
      Vec<A> sum[kChains] = {};
      for (Index r = 0; r < row_count; ++r) {
        const A* x = rows[r].a + x_offset + lane;
        const A* gy = rows[r].b + lane;
        Index k = 0;
        for (; k + kChains <= rows[r].k; k += kChains) {
#pragma GCC unroll 4
          for (int c = 0; c < kChains; ++c) {
            sum[c] += load(x + (k + c) * x_step) * load(gy + (k + c) * kPanel);
          }
        }
        for (; k < rows[r].k; ++k) sum[0] += load(x + k * x_step) * load(gy + k * kPanel);
      }
      store(sums + lane, load(sums + lane) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
  }
};

template <typename T, typename Units>
class GradWeight {
 public:
  using A = Accumulator<T>;

  // `in` and `out` select per group; a depth-wise group is one panel wide and its own input.
  GradWeight(const Image<const T>& grad_y, const Image<const T>& x, const Weight<T>& shape, T* to,
             const GroupedSelection& in, const GroupedSelection& out, const ConvWindow& window)
      : grad_y_(grad_y), x_(x), shape_(shape), to_(to), in_(in), out_(out), window_(window) {
    band_cols_ = (grad_y.cols - 1) * window.stride_w + (shape.kernel_w - 1) * window.dilation_w + 1;
  }

  void run(int threads) const {
    const Index panels = ceil_div(out_.count, kPanel), blocks = Units::channel_blocks(in_.count);
    const Index per_panel = blocks * shape_.taps(), units = out_.groups * panels * per_panel;
    const double pixels = double(grad_y_.n) * double(grad_y_.rows * grad_y_.cols);
    threads = useful_threads(threads, pixels * double(units * Units::unit_elements()));
    parallel(threads, [&](int thread, int of) {
      const Part part = part_of(units, thread, of);
      for (Index u = part.begin; u < part.end;) {
        const Index panel = u / per_panel, first = panel * per_panel;
        const Part within{u - first, smaller(part.end - first, per_panel)};
        run_panel(panel / panels, panel % panels * kPanel, within);
        u = first + within.end;
      }
    });
  }

 private:
  static constexpr bool kDepthwise = std::is_same_v<Units, DepthwiseUnits>;
  static constexpr Index kChunkBytes = 256 * 1024;

  // Units [begin, end) of the panel that starts at `lane`; a unit is block * taps + tap.
  void run_panel(Index group, Index lane, Part units) const {
    ThreadScratch& scratch = thread_scratch();
    const Index count = (units.end - units.begin) * Units::unit_elements();
    A* sums = scratch.cells.get<A>(count);
    std::memset(sums, 0, static_cast<std::size_t>(count) * sizeof(A));
    const Index taps = shape_.taps();
    const Index first = units.begin / taps * Units::kBlock;
    const Index last = smaller(ceil_div(units.end, taps) * Units::kBlock, in_.count);
    const Part channels =
        kDepthwise ? Part{lane, smaller(lane + kPanel, out_.count)} : Part{first, last};
    const int lanes = static_cast<int>(smaller(out_.count - lane, kPanel));
    const Index pixel = band_pixel<A>(channels.end - channels.begin, window_.stride_w);
    Chunk chunk = first_chunk(pixel);
    for (; next_chunk(chunk);) {
      add_chunk(group, lane, lanes, channels, pixel, units, chunk, sums);
      chunk.row += chunk.rows;
      if (chunk.row == grad_y_.rows) {
        chunk.row = 0;
        chunk.n += chunk.images;
      }
    }
    for (Index u = units.begin; u < units.end; ++u, sums += Units::unit_elements()) {
      write_unit(group, lane, lanes, u / taps, u % taps, sums);
    }
  }

  Index band_rows(Index rows) const {
    return (rows - 1) * window_.stride_h + (shape_.kernel_h - 1) * window_.dilation_h + 1;
  }

  // The size of a chunk depends on the shapes only, so that the order of the sum does too.
  Chunk first_chunk(Index) const {
    if (grad_y_.n == 0 || grad_y_.rows == 0 || grad_y_.cols == 0) return {0, 0, 0, 0};
    const Index channels = kDepthwise ? kPanel : in_.count;
    const Index row_bytes =
        (band_cols_ * channels * window_.stride_h + grad_y_.cols * kPanel) * Index{sizeof(A)};
    const Index rows = larger(kChunkBytes / row_bytes, 1);
    if (rows < grad_y_.rows) return {0, 1, 0, rows};
    return {0, rows / grad_y_.rows, 0, grad_y_.rows};
  }

  bool next_chunk(Chunk& chunk) const {
    if (chunk.rows == 0 || chunk.n >= grad_y_.n) return false;
    chunk.images = smaller(chunk.images, grad_y_.n - chunk.n);
    const Index all = grad_y_.rows;
    // The last part of an image may have fewer rows; the next image starts with a full part.
    const Index full = first_chunk(0).rows;
    chunk.rows = smaller(full, all - chunk.row);
    return true;
  }

  void add_chunk(Index group, Index lane, int lanes, Part channels, Index pixel, Part units,
                 const Chunk& chunk, A* sums) const {
    ThreadScratch& scratch = thread_scratch();
    const Index cols = grad_y_.cols, height = band_rows(chunk.rows);
    const Index image = height * band_cols_ * pixel, row_stride = band_cols_ * pixel;
    const Index x_step = window_.stride_w * pixel, count = channels.end - channels.begin;
    A* x = scratch.band.get<A>(chunk.images * image + kPanel);
    A* gy = scratch.panel.get<A>(chunk.images * chunk.rows * cols * kPanel);
    Tap<A>* rows = scratch.taps.get<Tap<A>>(chunk.images * chunk.rows);
    Index row_count = 0;
    for (Index i = 0; i < chunk.images; ++i) {
      copy_band<T, A>(x_, chunk.n + i, chunk.row * window_.stride_h - window_.pad_top, height,
                      -window_.pad_left, band_cols_, group * in_.count + channels.begin, count,
                      pixel, x + i * image);
      A* gy_image = gy + i * chunk.rows * cols * kPanel;
      copy_grad_y(chunk.n + i, chunk.row, chunk.rows, group * out_.count + lane, lanes, gy_image);
      for (Index r = 0; r < chunk.rows; ++r) {
        const A* a = x + i * image + r * window_.stride_h * row_stride;
        add_row(rows, row_count, a, gy_image + r * cols * kPanel, x_step);
      }
    }
    const Index taps = shape_.taps();
    for (Index u = units.begin; u < units.end; ++u, sums += Units::unit_elements()) {
      const Index block = kDepthwise ? 0 : u / taps * Units::kBlock - channels.begin,
                  tap = u % taps;
      const Index offset = tap / shape_.kernel_w * window_.dilation_h * row_stride +
                           tap % shape_.kernel_w * window_.dilation_w * pixel + block;
      Units::add(rows, row_count, x_step, offset, smaller(Units::kBlock, count - block), lanes,
                 sums);
    }
  }

  // Rows that follow each other in both operands are one longer sum.
  void add_row(Tap<A>* rows, Index& count, const A* x, const A* gy, Index x_step) const {
    if (count > 0) {
      Tap<A>& before = rows[count - 1];
      if (before.a + before.k * x_step == x && before.b + before.k * kPanel == gy) {
        before.k += grad_y_.cols;
        return;
      }
    }
    rows[count++] = {x, gy, grad_y_.cols};
  }

  // [rows, cols, kPanel]; lanes without a channel are zero.
  void copy_grad_y(Index n, Index row, Index rows, Index channel, int lanes, A* to) const {
    for (Index r = row; r < row + rows; ++r) {
      const T* from = grad_y_.data + n * grad_y_.n_stride + r * grad_y_.row_stride + channel;
      for (Index c = 0; c < grad_y_.cols; ++c, from += grad_y_.col_stride, to += kPanel) {
        for (int l = 0; l < lanes; ++l) to[l] = widen(from[l]);
        for (int l = lanes; l < kPanel; ++l) to[l] = A(0);
      }
    }
  }

  void write_unit(Index group, Index lane, int lanes, Index block, Index tap, const A* sums) const {
    const Index position = tap / shape_.kernel_w * shape_.h_stride +
                           tap % shape_.kernel_w * shape_.w_stride +
                           (out_.first_group + group) * out_.per_group * shape_.out_stride;
    const Index channels =
        kDepthwise ? 1 : smaller(Units::kBlock, in_.count - block * Units::kBlock);
    for (Index i = 0; i < channels; ++i) {
      const Index in = kDepthwise ? 0 : in_.channel(block * Units::kBlock + i);
      T* to = to_ + position + in * shape_.in_stride;
      for (int l = 0; l < lanes; ++l) {
        narrow(sums[i * kPanel + l], to[out_.channel(lane + l) * shape_.out_stride]);
      }
    }
  }

  Image<const T> grad_y_, x_;
  Weight<T> shape_;
  T* to_;
  GroupedSelection in_, out_;
  ConvWindow window_;
  Index band_cols_;
};

template <typename T>
void fill_zero(const Weight<T>& shape, T* to) {
  const Index elements = shape.out * shape.in * shape.taps();
  if (elements == 0) return;
  const Index extent = (shape.out - 1) * shape.out_stride + (shape.in - 1) * shape.in_stride +
                       (shape.kernel_h - 1) * shape.h_stride +
                       (shape.kernel_w - 1) * shape.w_stride + 1;
  if (extent == elements) {  // dense in some order of its dimensions
    std::memset(static_cast<void*>(to), 0, static_cast<std::size_t>(elements) * sizeof(T));
    return;
  }
  for (Index o = 0; o < shape.out; ++o) {
    for (Index i = 0; i < shape.in; ++i) {
      for (Index t = 0; t < shape.taps(); ++t) {
        to[o * shape.out_stride + i * shape.in_stride + t / shape.kernel_w * shape.h_stride +
           t % shape.kernel_w * shape.w_stride] = T{};
      }
    }
  }
}

template <typename T>
void grad_weight(const TensorView& grad_y_view, const TensorView& x_view,
                 const TensorView& grad_weight_view, const NestedConv2d& conv) {
  const auto grad_y = image_of<const T>(grad_y_view);
  const auto x = image_of<const T>(x_view);
  const auto shape = weight_of<T>(grad_weight_view);
  T* to = grad_weight_view.as<T>();
  fill_zero(shape, to);
  if (is_depthwise(grad_weight_view, conv.groups)) {
    const GroupedSelection in{1, 0, 1, 0, 1, nullptr};
    const GroupedSelection out{shape.out, 0, 1, conv.out.lo, conv.out.count, nullptr};
    GradWeight<T, DepthwiseUnits>(grad_y, x, shape, to, in, out, conv.window).run(conv.threads);
    return;
  }
  const GroupedSelection in = grouped(conv.in, shape.in, conv.groups);
  const GroupedSelection out = grouped(conv.out, shape.out / conv.groups, conv.groups);
  GradWeight<T, DenseUnits>(grad_y, x, shape, to, in, out, conv.window).run(conv.threads);
}

}  // namespace

void nested_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                               const TensorView& grad_weight_view, const NestedConv2d& conv) {
  for_dtype(x.dtype, [&](auto t) { grad_weight<decltype(t)>(grad_y, x, grad_weight_view, conv); });
}

}  // namespace pyeff::cpu::PYEFF_ISA
