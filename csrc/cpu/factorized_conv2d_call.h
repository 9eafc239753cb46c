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

  // What the horizontal line reads of a row: from column -padding on.
  Index band_cols() const {
    return larger(padding + x.cols, (y.cols - 1) * stride + (taps() - 1) * dilation + 1);
  }
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
    T* to = row_of_y(n, h);
    for (Index c = 0; c < call_.y.cols; ++c) {
      const R* from = out.data + c * out.pixel;
      T* pixel = to + c * call_.y.col_stride;
      if constexpr (std::is_same_v<T, R>) {
        std::memcpy(pixel, from, static_cast<std::size_t>(call_.y.channels) * sizeof(T));
      } else {
        for (Index l = 0; l < call_.y.channels; ++l) narrow(from[l], pixel[l]);
      }
    }
  }

 private:
  void apply_gate(Index n, Index h, const RowOut<R>& out) {
    using A = Accumulator<R>;
    const Image<const T>& gate = call_.gate;
    const Index channels = call_.y.channels;
    for (Index c = 0; c < call_.y.cols; ++c) {
      const T* at = gate.data + n * gate.n_stride + h * gate.row_stride + c * gate.col_stride;
      R* to = out.data + c * out.pixel;
      Index l = 0;
      if constexpr (std::is_same_v<T, A>) {
        for (; l + kLanes<A> <= channels; l += kLanes<A>) {
          store(to + l, load(to + l) * derivative<A>(load(at + l), call_.gate_activation));
        }
      }
      for (; l < channels; l += kLanes<A>)
        gate_some(at + l, smaller(kLanes<A>, channels - l), to + l);
    }
  }

  // Of a type that has no vectors here, or fewer than a vector of channels.
  void gate_some(const T* at, Index count, R* to) {
    using A = Accumulator<R>;
    alignas(kVecBytes) A factor[kLanes<A>] = {};
    for (Index i = 0; i < count; ++i) factor[i] = widen(at[i]);
    store(factor, derivative<A>(load(factor), call_.gate_activation));
    for (Index i = 0; i < count; ++i) narrow(widen(to[i]) * factor[i], to[i]);
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
