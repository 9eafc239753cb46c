// factorized_conv2d, gradients of a line's weight and bias, of a vertical line
//   gW[o, i, u] = sum_{n, h, w} gy[n, o, h, w] x[n, i, h s + u d - p, w],   gb[o] = sum gy[n, o, h,
//   w]
// and likewise of a horizontal one. A unit of work is a block of input channels times a panel of
// output channels of one tap; its sums belong to one thread, which adds the pixels in the same
// order whatever the number of threads. Pieces of rows that fit the first-level cache are taken one
// after the other, where they lie if that is possible.

#include "cpu/factorized_conv2d_call.h"
#include "cpu/factorized_conv2d_kernels.h"
#include "cpu/factorized_conv2d_weights.h"
#include "cpu/nested_conv2d_types.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Neighbouring pixels of a row of grad_y: where it is, and the pixels themselves.
template <typename A>
struct Piece {
  Index n, row, col, pixels;
  const A* data;
};

template <typename T>
class LineGradWeight {
 public:
  using A = Accumulator<T>;

  // `shape` has the weight's sizes; `to` and its strides are the gradient's.
  LineGradWeight(const Image<const T>& grad_y, const Image<const T>& x, const LineLayout& shape,
                 const LineWeight<T>& to, bool vertical, const FactorizedConv2d& conv)
      : grad_y_(grad_y), x_(x), shape_(shape), to_(to), vertical_(vertical), conv_(conv) {
    blocks_ = ceil_div(shape.in, kTilePixels);
    panels_ = ceil_div(shape.lanes(), kPanel);
    x_in_place_ = std::is_same_v<T, A>;
    grad_y_in_place_ = std::is_same_v<T, A> && shape.out % kNarrow == 0;
    const Index pixel_bytes = (shape.in + shape.lanes()) * Index{sizeof(A)};
    piece_ = larger(smaller(kPieceBytes / pixel_bytes, kMostPixels), kFewestPixels);
  }

  // grad_bias may be null.
  void run(T* grad_bias, int threads) const {
    const Index units = shape_.taps * blocks_ * panels_;
    const double pixels = double(grad_y_.n) * double(grad_y_.rows * grad_y_.cols);
    threads = useful_threads(threads, pixels * double(shape_.taps * shape_.in * shape_.out));
    parallel(threads, [&](int thread, int of) {
      const Part mine = part_of(units, thread, of);
      T* bias = thread == 0 ? grad_bias : nullptr;
      for (Index u = mine.begin; u < mine.end || bias != nullptr; u += kPassUnits, bias = nullptr) {
        Worker(*this, {u, smaller(u + kPassUnits, mine.end)}, bias).run();
      }
    });
  }

 private:
  static constexpr Index kPieceBytes = 128 * 1024, kMostPixels = 256, kFewestPixels = 48;
  // Sums of a pass over all pixels, which should stay in the second-level cache.
  static constexpr Index kSumBytes = 384 * 1024;

  static constexpr Index kUnit = kTilePixels * kPanel;
  static constexpr Index kPassUnits = kSumBytes / (kUnit * Index{sizeof(A)});

  Part inputs_of(Index block) const {
    return part_of(shape_.in, static_cast<int>(block), static_cast<int>(blocks_));
  }

  // One thread's units and where their sums are.
  class Worker {
   public:
    Worker(const LineGradWeight& line, Part units, T* grad_bias)
        : line_(line), units_(units), grad_bias_(grad_bias) {
      FactorizedScratch& scratch = factorized_scratch();
      const LineLayout& shape = line.shape_;
      const Index count = (units.end - units.begin) * kUnit;
      sums_ = scratch.out.get<A>(count + shape.lanes());
      bias_sums_ = sums_ + count;
      std::memset(sums_, 0, static_cast<std::size_t>(count + shape.lanes()) * sizeof(A));
      pieces_ = scratch.row_taps.get<Piece<A>>(line.piece_);
      taps_ = scratch.taps.get<Tap<A>>(line.piece_);
      if (!line.x_in_place_) {  // a row of x for every piece, as wide as its pixels reach
        const Index reach = smaller(x_step(), line.x_.cols);
        x_copy_ = scratch.source.get<A>(line.piece_ * reach * shape.in);
      }
      if (!line.grad_y_in_place_) grad_copy_ = scratch.middle.get<A>(line.piece_ * shape.lanes());
    }

    void run() {
      const Image<const T>& gy = line_.grad_y_;
      Index count = 0, pixels = 0;
      for (Index n = 0; n < gy.n; ++n) {
        for (Index h = 0; h < gy.rows; ++h) {
          for (Index w = 0; w < gy.cols;) {
            const Index some = smaller(line_.piece_ - pixels, gy.cols - w);
            pieces_[count++] = {n, h, w, some, load_grad_y(n, h, w, some, pixels)};
            pixels += some;
            w += some;
            if (pixels < line_.piece_) continue;
            add_pieces(count);
            count = pixels = 0;
          }
        }
      }
      if (count > 0) add_pieces(count);
      for (Index u = units_.begin; u < units_.end; ++u) write_unit(u);
      if (grad_bias_ == nullptr) return;
      for (Index o = 0; o < line_.shape_.out; ++o) narrow(bias_sums_[o], grad_bias_[o]);
    }

   private:
    Index grad_pixel() const {
      return line_.grad_y_in_place_ ? line_.grad_y_.col_stride : line_.shape_.lanes();
    }
    Index x_pixel() const { return line_.x_in_place_ ? line_.x_.col_stride : line_.shape_.in; }
    Index x_step() const { return line_.vertical_ ? 1 : line_.conv_.stride; }

    void add_pieces(Index count) {
      if (grad_bias_ != nullptr) add_bias(count);
      const Index per_tap = line_.blocks_ * line_.panels_;
      for (Index u = units_.begin; u < units_.end;) {
        const Index tap = u / per_tap, end = smaller(units_.end, (tap + 1) * per_tap);
        add_tap(count, tap, {u - tap * per_tap, end - tap * per_tap},
                sums_ + (u - units_.begin) * kUnit);
        u = end;
      }
    }

    // Units [begin, end) of one tap.
    void add_tap(Index count, Index tap, Part units, A* sums) {
      TileCall<A> call{};
      call.taps = taps_;
      call.a_pixel = 1;
      call.a_step = x_step() * x_pixel();
      call.b_step = grad_pixel();
      call.out_pixel = kPanel;
      A* copy = x_copy_;
      for (Index i = 0; i < count; ++i) list_piece(pieces_[i], tap, copy, call.tap_count);
      if (call.tap_count == 0) return;
      for (Index u = units.begin; u < units.end; ++u, sums += kUnit) run_unit(u, call, sums);
    }

    // The pixels of a piece whose pixel of x exists.
    void list_piece(const Piece<A>& piece, Index tap, A*& copy, Index& count) {
      const FactorizedConv2d& conv = line_.conv_;
      const Index shift = tap * conv.dilation - conv.padding, step = x_step();
      Index row = piece.row, col = piece.col, first = 0, pixels = piece.pixels;
      if (line_.vertical_) {
        row = row * conv.stride + shift;
        if (row < 0 || row >= line_.x_.rows) return;
      } else {
        const Index room = line_.x_.cols - 1 - shift;
        const Index begin = larger(ceil_div(larger(-shift, 0), step), col);
        const Index end = room < 0 ? 0 : smaller(room / step + 1, col + pixels);
        if (begin >= end) return;
        first = begin - col;
        pixels = end - begin;
        col = begin * step + shift;
      }
      const Index reach = (pixels - 1) * step + 1;
      const A* x = load_x(piece.n, row, col, reach, copy);
      taps_[count++] = {x, piece.data + first * grad_pixel(), pixels};
      if (!line_.x_in_place_) copy += reach * line_.shape_.in;
    }

    void run_unit(Index unit, TileCall<A> call, A* sums) {
      const Index lane = unit / line_.blocks_ * kPanel;
      const Part inputs = line_.inputs_of(unit % line_.blocks_);
      const int pixels = static_cast<int>(inputs.end - inputs.begin);
      const Index vecs = line_.shape_.width(lane) / kLanes<A>;
      call.a_offset = inputs.begin;
      for (Index v = 0; v < vecs; v += kTileVecs) {
        call.b_offset = lane + v * kLanes<A>;
        call.out = sums + v * kLanes<A>;
        run_tile<DenseTile>(pixels, static_cast<int>(smaller(kTileVecs, vecs - v)), call);
      }
    }

    void add_bias(Index count) {
      for (Index l = 0; l < line_.shape_.lanes(); l += kLanes<A>) {
        Vec<A> sums[2] = {load(bias_sums_ + l), Vec<A>{}};  // to hide the latency of the addition
        for (Index i = 0; i < count; ++i) {
          const A* data = pieces_[i].data + l;
          for (Index c = 0; c < pieces_[i].pixels; ++c)
            sums[c % 2] += load(data + c * grad_pixel());
        }
        store(bias_sums_ + l, sums[0] + sums[1]);
      }
    }

    // `at` counts the pixels that were loaded before.
    const A* load_grad_y(Index n, Index h, Index w, Index pixels, Index at) {
      const Image<const T>& gy = line_.grad_y_;
      const T* from = gy.data + n * gy.n_stride + h * gy.row_stride + w * gy.col_stride;
      if constexpr (std::is_same_v<T, A>) {
        if (line_.grad_y_in_place_) return from;
      }
      const Index lanes = line_.shape_.lanes(), channels = line_.shape_.out;
      A* const first = grad_copy_ + at * lanes;
      for (Index c = 0; c < pixels; ++c) {
        A* to = first + c * lanes;
        widen_row(from + c * gy.col_stride, to, channels);
        for (Index l = channels; l < lanes; ++l) to[l] = A(0);
      }
      return first;
    }

    const A* load_x(Index n, Index row, Index col, Index pixels, A* copy) {
      const Image<const T>& x = line_.x_;
      const T* from = x.data + n * x.n_stride + row * x.row_stride + col * x.col_stride;
      if constexpr (std::is_same_v<T, A>) {
        (void)pixels, (void)copy;
        return from;
      } else {
        const Index channels = line_.shape_.in;
        widen_pixels(from, x.col_stride, copy, channels, pixels, channels);
        return copy;
      }
    }

    void write_unit(Index u) {
      const LineLayout& shape = line_.shape_;
      const Index per_tap = line_.blocks_ * line_.panels_, tap = u / per_tap, unit = u % per_tap;
      const Index lane = unit / line_.blocks_ * kPanel;
      const Part inputs = line_.inputs_of(unit % line_.blocks_);
      const A* sums = sums_ + (u - units_.begin) * kUnit;
      for (Index i = inputs.begin; i < inputs.end; ++i, sums += kPanel) {
        for (Index o = lane; o < smaller(lane + kPanel, shape.out); ++o) {
          T* to = const_cast<T*>(line_.to_.data) + o * line_.to_.out_stride +
                  i * line_.to_.in_stride + tap * line_.to_.tap_stride;
          narrow(sums[o - lane], *to);
        }
      }
    }

    const LineGradWeight& line_;
    Part units_;
    T* grad_bias_;
    A *sums_, *bias_sums_, *x_copy_ = nullptr, *grad_copy_ = nullptr;
    Piece<A>* pieces_;
    Tap<A>* taps_;
  };

  Image<const T> grad_y_, x_;
  LineLayout shape_;
  LineWeight<T> to_;
  bool vertical_;
  FactorizedConv2d conv_;
  Index blocks_, panels_, piece_;
  bool x_in_place_, grad_y_in_place_;
};

}  // namespace

void factorized_conv2d_grad_weight(const TensorView& grad_y, const TensorView& x,
                                   const Line& grad_line, const TensorView* grad_bias,
                                   const FactorizedConv2d& conv) {
  for_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    const LineGradWeight<T> line(image_of<const T>(grad_y), image_of<const T>(x),
                                 line_layout(grad_line, false), line_weight_of<T>(grad_line),
                                 grad_line.vertical, conv);
    line.run(grad_bias == nullptr ? nullptr : grad_bias->as<T>(), conv.threads);
  });
}

}  // namespace pyeff::cpu::PYEFF_ISA
