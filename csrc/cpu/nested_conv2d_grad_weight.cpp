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

// Some rows of grad_y: of several whole images, or part of one.
struct Chunk {
  Index n, images, row, rows;
};

// What one thread sums at a time: units [begin, end) of the panel that starts at `lane` of a group.
struct Work {
  Index group, lane;
  int lanes;
  Part units;     // a unit is block * taps + tap
  Part channels;  // of x, within the group, that these units read
  Index pixel;    // their distance in the band
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
    // The chunks depend on the shapes only, so that the order of the sum does too.
    const Index channels = kDepthwise ? kPanel : in.count;
    const Index row_bytes =
        (band_cols_ * channels * window.stride_h + grad_y.cols * kPanel) * Index{sizeof(A)};
    const Index rows = larger(kChunkBytes / larger(row_bytes, 1), 1);
    chunk_rows_ = larger(smaller(rows, grad_y.rows), 1);
    chunk_images_ = larger(rows / chunk_rows_, 1);
    if (chunk_rows_ < grad_y.rows) chunk_images_ = 1;
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

  void run_panel(Index group, Index lane, Part units) const {
    const Index count = (units.end - units.begin) * Units::unit_elements();
    A* sums = thread_scratch().cells.get<A>(count);
    std::memset(sums, 0, static_cast<std::size_t>(count) * sizeof(A));
    Work work{group, lane, static_cast<int>(smaller(out_.count - lane, kPanel)), units, {}, 0};
    work.channels = channels_of(lane, units);
    work.pixel = band_pixel<A>(work.channels.end - work.channels.begin, window_.stride_w);
    for (Index n = 0; n < grad_y_.n && grad_y_.cols > 0; n += chunk_images_) {
      const Index images = smaller(chunk_images_, grad_y_.n - n);
      for (Index row = 0; row < grad_y_.rows; row += chunk_rows_) {
        const Index rows = smaller(chunk_rows_, grad_y_.rows - row);
        add_chunk(work, {n, images, row, rows}, sums);
      }
    }
    for (Index u = units.begin; u < units.end; ++u, sums += Units::unit_elements()) {
      write_unit(work, u / shape_.taps(), u % shape_.taps(), sums);
    }
  }

  Part channels_of(Index lane, Part units) const {
    if (kDepthwise) return {lane, smaller(lane + kPanel, out_.count)};
    const Index taps = shape_.taps();
    return {units.begin / taps * Units::kBlock,
            smaller(ceil_div(units.end, taps) * Units::kBlock, in_.count)};
  }

  Index band_rows(Index rows) const {
    return (rows - 1) * window_.stride_h + (shape_.kernel_h - 1) * window_.dilation_h + 1;
  }

  void add_chunk(const Work& work, const Chunk& chunk, A* sums) const {
    ThreadScratch& scratch = thread_scratch();
    const Index cols = grad_y_.cols, height = band_rows(chunk.rows), pixel = work.pixel;
    const Index row_stride = band_cols_ * pixel, image = height * row_stride;
    const Index x_step = window_.stride_w * pixel;
    const Index count = work.channels.end - work.channels.begin;
    A* x = scratch.band.get<A>(chunk.images * image + kPanel);
    A* gy = scratch.panel.get<A>(chunk.images * chunk.rows * cols * kPanel);
    Tap<A>* rows = scratch.taps.get<Tap<A>>(chunk.images * chunk.rows);
    Index row_count = 0;
    for (Index i = 0; i < chunk.images; ++i) {
      copy_band<T, A>(x_, chunk.n + i, chunk.row * window_.stride_h - window_.pad_top, height,
                      -window_.pad_left, band_cols_, work.group * in_.count + work.channels.begin,
                      count, pixel, x + i * image);
      A* gy_image = gy + i * chunk.rows * cols * kPanel;
      copy_grad_y(work, chunk.n + i, chunk.row, chunk.rows, gy_image);
      for (Index r = 0; r < chunk.rows; ++r) {
        const A* a = x + i * image + r * window_.stride_h * row_stride;
        add_row(rows, row_count, a, gy_image + r * cols * kPanel, x_step);
      }
    }
    const Index taps = shape_.taps();
    for (Index u = work.units.begin; u < work.units.end; ++u, sums += Units::unit_elements()) {
      const Index block = kDepthwise ? 0 : u / taps * Units::kBlock - work.channels.begin;
      const Index tap = u % taps;
      const Index offset = tap / shape_.kernel_w * window_.dilation_h * row_stride +
                           tap % shape_.kernel_w * window_.dilation_w * pixel + block;
      Units::add(rows, row_count, x_step, offset, smaller(Units::kBlock, count - block), work.lanes,
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
  void copy_grad_y(const Work& work, Index n, Index row, Index rows, A* to) const {
    const Index channel = work.group * out_.count + work.lane;
    const int lanes = work.lanes;
    for (Index r = row; r < row + rows; ++r) {
      const T* from = grad_y_.data + n * grad_y_.n_stride + r * grad_y_.row_stride + channel;
      for (Index c = 0; c < grad_y_.cols; ++c, from += grad_y_.col_stride, to += kPanel) {
        for (int l = 0; l < lanes; ++l) to[l] = widen(from[l]);
        for (int l = lanes; l < kPanel; ++l) to[l] = A(0);
      }
    }
  }

  void write_unit(const Work& work, Index block, Index tap, const A* sums) const {
    const Index position = tap / shape_.kernel_w * shape_.h_stride +
                           tap % shape_.kernel_w * shape_.w_stride +
                           (out_.first_group + work.group) * out_.per_group * shape_.out_stride;
    const Index channels =
        kDepthwise ? 1 : smaller(Units::kBlock, in_.count - block * Units::kBlock);
    for (Index i = 0; i < channels; ++i) {
      const Index in = kDepthwise ? 0 : in_.channel(block * Units::kBlock + i);
      T* to = to_ + position + in * shape_.in_stride;
      for (int l = 0; l < work.lanes; ++l) {
        narrow(sums[i * kPanel + l], to[out_.channel(work.lane + l) * shape_.out_stride]);
      }
    }
  }

  Image<const T> grad_y_, x_;
  Weight<T> shape_;
  T* to_;
  GroupedSelection in_, out_;
  ConvWindow window_;
  Index band_cols_, chunk_rows_, chunk_images_;
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
