#pragma once
// What the direct and the Winograd form of a pair of 1-D convolutions share: the call, and the rows
// of y that they write.

#include "cpu/factorized_conv2d_line.h"
#include "cpu/image.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Rows of bfloat16 bits are those of the dot products.
inline float widen(std::uint16_t bits) { return widen(BFloat16{bits}); }
inline void narrow(float v, std::uint16_t& out) {
  BFloat16 rounded;
  narrow(v, rounded);
  out = rounded.bits;
}

struct FactorizedScratch {
  Scratch source, middle, out, residual, taps, row_taps, transformed;
  Scratch weights, vectors;  // of the calling thread, read by all
};
inline FactorizedScratch& factorized_scratch() {
  static thread_local FactorizedScratch scratch;
  return scratch;
}

// What a horizontal line reads: a row with zeros around it. Taps that meet zeros alone, as all but
// one do whose dilation is larger than the row, are left out, and with them the zeros: they would
// take memory in proportion to the dilation.
struct RowBand {
  Index first_tap, end_tap;
  Index left;  // zeros before column 0
  Index cols;  // with them, the row itself and the zeros behind it

  // A row of `in` pixels and one of `out` results.
  RowBand(Index in, Index out, Index taps, Index stride, Index padding, Index dilation)
      : dilation_(dilation), padding_(padding) {
    const Index reach = (out - 1) * stride;  // from a tap's first pixel to its last one
    first_tap = ceil_div(larger(padding - reach, 0), dilation);
    end_tap = smaller(ceil_div(in + padding, dilation), taps);
    left = 0;
    cols = in;
    if (first_tap >= end_tap) {
      first_tap = end_tap = 0;
      return;
    }
    left = larger(-column(first_tap), 0);
    cols = left + larger(in, column(end_tap - 1) + reach + 1);
  }

  // Of the row, where a tap reads for the first result.
  Index column(Index tap) const { return tap * dilation_ - padding_; }

 private:
  Index dilation_, padding_;
};

// Everything that the threads of a call share.
template <typename T>
struct PairCall {
  using A = Accumulator<T>;

  Image<const T> x, residual;  // residual.data may be null
  Image<T> y;
  LineKernel<A> first, second;
  bool paired;          // whether there is a second line
  bool vertical_first;  // or, of a single line, whether it is vertical
  Index stride, padding, dilation;
  // Where gate.data is not null, the result is multiplied by the activation's derivative there.
  Image<const T> gate;
  Activation gate_activation;

  Index taps() const { return first.layout.taps; }
  const LineKernel<A>& last() const { return paired ? second : first; }

  RowBand band() const { return RowBand(x.cols, y.cols, taps(), stride, padding, dilation); }
  double multiply_adds() const {
    const double first_pixels = !paired          ? double(y.rows * y.cols)
                                : vertical_first ? double(y.rows * x.cols)
                                                 : double(x.rows * y.cols);
    double sum = first_pixels * double(first.layout.in * first.layout.out);
    if (paired) sum += double(y.rows * y.cols) * double(second.layout.in * second.layout.out);
    return sum * double(y.n) * double(taps());
  }
};

// Rows of y and of what is added to it as the lines want them: of type R and with whole vectors of
// channels, in place where they lie so.
template <typename T, typename R>
class PairRows {
 public:
  // At most `slots` rows are open at a time.
  PairRows(const PairCall<T>& call, Index slots) : call_(call) {
    const Index channels = call.y.channels;
    direct_ = std::is_same_v<T, R> && channels % kNarrow == 0;
    pixel_ = padded_lanes(channels);
    if (direct_) return;
    const Index elements = slots * call.y.cols * pixel_;
    out_ = factorized_scratch().out.get<R>(elements);
    if (call.residual.data != nullptr) residual_ = factorized_scratch().residual.get<R>(elements);
  }

  RowOut<R> open(Index n, Index h, Index slot) {
    const Image<const T>& residual = call_.residual;
    const T* added = residual.data == nullptr
                         ? nullptr
                         : residual.data + n * residual.n_stride + h * residual.row_stride;
    if constexpr (std::is_same_v<T, R>) {
      if (direct_) return {row_of_y(n, h), call_.y.col_stride, added, residual.col_stride};
    }
    RowOut<R> out{};
    out.data = out_ + slot * call_.y.cols * pixel_;
    out.pixel = pixel_;
    if (added != nullptr) {
      R* to = residual_ + slot * call_.y.cols * pixel_;
      widen_pixels(added, residual.col_stride, to, pixel_, call_.y.cols, call_.y.channels);
      out.residual = to;
      out.residual_pixel = pixel_;
    }
    return out;
  }

  void close(Index n, Index h, const RowOut<R>& out) {
    if (call_.gate.data != nullptr) apply_gate(n, h, out);
    if (direct_) return;
    if constexpr (std::is_same_v<T, R>) {
      copy_pixels(out.data, row_of_y(n, h));
    } else {
      narrow_pixels(out.data, row_of_y(n, h));
    }
  }

 private:
  // A pixel is copied in whole pieces; what they write beyond it the next pixel writes again.
  void copy_pixels(const T* from, T* to) const {
    constexpr std::size_t kPiece = 32;
    static_assert(kNarrow * sizeof(T) % kPiece == 0);
    const Index channels = call_.y.channels, cols = call_.y.cols;
    const auto bytes = static_cast<std::size_t>(channels) * sizeof(T);
    const Index dense = call_.y.col_stride == channels ? (cols * channels - pixel_) / channels : 0;
    Index c = 0;
    for (; c < dense; ++c, from += pixel_, to += channels) {
      for (std::size_t b = 0; b < bytes; b += kPiece) {
        std::memcpy(reinterpret_cast<char*>(to) + b, reinterpret_cast<const char*>(from) + b,
                    kPiece);
      }
    }
    for (; c < cols; ++c, from += pixel_, to += call_.y.col_stride) std::memcpy(to, from, bytes);
  }

  void narrow_pixels(const R* from, T* to) const {
    const Index channels = call_.y.channels, cols = call_.y.cols;
    if (pixel_ == channels && call_.y.col_stride == channels) {
      for (Index i = 0; i < cols * channels; ++i) narrow(from[i], to[i]);
      return;
    }
    for (Index c = 0; c < cols; ++c, from += pixel_, to += call_.y.col_stride) {
      for (Index l = 0; l < channels; ++l) narrow(from[l], to[l]);
    }
  }

  void apply_gate(Index n, Index h, const RowOut<R>& out) {
    using A = Accumulator<R>;
    const Image<const T>& gate = call_.gate;
    const Index channels = call_.y.channels;
    for (Index c = 0; c < call_.y.cols; ++c) {
      const T* at = gate.data + n * gate.n_stride + h * gate.row_stride + c * gate.col_stride;
      R* to = out.data + c * out.pixel;
      Index l = 0;
      for (; l + kLanes<A> <= channels; l += kLanes<A>) {
        if constexpr (std::is_same_v<T, A>) {
          const Vec<A> grad = load(to + l);
          store(to + l, through_activation<A>(grad, load(at + l), call_.gate_activation));
        } else {
          gate_some(at + l, kLanes<A>, to + l);
        }
      }
      if (l < channels) gate_some(at + l, channels - l, to + l);
    }
  }

  // At most a vector of channels; inlined, so that a whole one is converted as one.
  inline void gate_some(const T* at, Index count, R* to) {
    using A = Accumulator<R>;
    alignas(kVecBytes) A bend[kLanes<A>] = {}, grad[kLanes<A>] = {};
    for (Index i = 0; i < count; ++i) bend[i] = widen(at[i]);
    for (Index i = 0; i < count; ++i) grad[i] = widen(to[i]);
    store(grad, through_activation<A>(load(grad), load(bend), call_.gate_activation));
    for (Index i = 0; i < count; ++i) narrow(grad[i], to[i]);
  }

  T* row_of_y(Index n, Index h) const {
    return call_.y.data + n * call_.y.n_stride + h * call_.y.row_stride;
  }

  const PairCall<T>& call_;
  bool direct_;
  Index pixel_;
  R *out_ = nullptr, *residual_ = nullptr;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
