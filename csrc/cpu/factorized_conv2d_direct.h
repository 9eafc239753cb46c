#pragma once
// A pair of 1-D convolutions, or one alone, row by row. The map between the two exists as one row
// (vertical first: the horizontal line reads no other) or as the last n rows of a chain (horizontal
// first), so that nothing is computed twice but at the borders between threads.

#include "cpu/factorized_conv2d_call.h"
#include "cpu/factorized_conv2d_rows.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// One thread's part of a call. Conv runs a row of a line; its rows, the middle map too, are of type
// Conv::Row.
template <typename T, typename Conv>
class PairWorker {
 public:
  using A = Accumulator<T>;
  using R = typename Conv::Row;

  explicit PairWorker(const PairCall<T>& call)
      : call_(call),
        band_(call.band()),
        rows_(call, 1),
        order_(call.y.rows, call.stride, call.dilation),
        scratch_(factorized_scratch()),
        row_taps_(scratch_.row_taps.get<RowTap<R>>(call.taps())),
        first_(call.first, scratch_.taps.get<Tap<A>>(call.taps())),
        last_(call.last(), scratch_.taps.get<Tap<A>>(call.taps())),
        next_(call.x),
        ring_(make_ring()) {
    if (call.paired && call.vertical_first) clear_sides();
  }

  // Positions of the chain order, counted over all images.
  void run(Part positions) {
    for (Index t = positions.begin; t < positions.end; ++t) {
      const Index n = t / call_.y.rows, h = order_.row(t % call_.y.rows);
      const RowOut<R> out = rows_.open(n, h, 0);
      prefetch_next(t + 1, positions.end);
      if (!call_.vertical_first) {
        horizontal_first(n, h, out);
      } else {
        vertical_first(n, h, out);
      }
      rows_.close(n, h, out);
    }
  }

 private:
  // The rows of x that the next position reads and this one does not.
  void prefetch_next(Index t, Index end) {
    next_.clear();
    if (t == end) return;
    const Index n = t / call_.y.rows, last = order_.row((t + call_.y.rows - 1) % call_.y.rows);
    const Index h = order_.row(t % call_.y.rows), span = (call_.taps() - 1) * call_.dilation;
    if (!call_.paired && !call_.vertical_first) {
      next_.add(n, h);
    } else {
      const bool chained = h == last + order_.step();
      const Index known = last * call_.stride - call_.padding + span;  // the latest row
      for (Index u = 0; u < call_.taps(); ++u) {
        const Index r = h * call_.stride - call_.padding + u * call_.dilation;
        if (r >= 0 && r < call_.x.rows && !(chained && r <= known)) next_.add(n, r);
      }
    }
    const bool both = call_.paired && call_.vertical_first;
    next_.spread(last_.tiles(call_.y.cols) + (both ? first_.tiles(call_.x.cols) : 0));
  }

  void vertical_first(Index n, Index h, const RowOut<R>& out) {
    const Index count = list_vertical(h, [&](Index r) { return source_row(n, r); });
    if (!call_.paired) {
      last_.run(row_taps_, count, source_pixel_, call_.y.cols, out, [&] { next_.step(); });
      return;
    }
    first_.run(row_taps_, count, source_pixel_, call_.x.cols,
               {middle_ + band_.left * middle_pixel_, middle_pixel_, nullptr, 0},
               [&] { next_.step(); });
    clear_odd_channel(middle_ + band_.left * middle_pixel_, call_.x.cols);
    const Index band_count = list_horizontal(middle_, middle_pixel_);
    last_.run(row_taps_, band_count, call_.stride * middle_pixel_, call_.y.cols, out,
              [&] { next_.step(); });
  }

  void horizontal_first(Index n, Index h, const RowOut<R>& out) {
    if (!call_.paired) {
      horizontal(last_, n, h, out);
      return;
    }
    const Index pixel = middle_pixel_;
    const auto make = [&](Index r, R* row) {
      horizontal(first_, n, r, {row, pixel, nullptr, 0});
      clear_odd_channel(row, call_.y.cols);
    };
    // Making a row overwrites the list of taps: first all rows, then the list.
    list_vertical(h, [&](Index r) { return ring_.get(n, r, make); });
    const Index count = list_vertical(h, [&](Index r) { return ring_.get(n, r, make); });
    last_.run(row_taps_, count, middle_pixel_, call_.y.cols, out, [&] { next_.step(); });
  }

  // A horizontal line over row r of x.
  void horizontal(const Conv& line, Index n, Index r, const RowOut<R>& out) {
    const Index channels = call_.x.channels;
    copy_band<T, R>(call_.x, n, r, 1, -band_.left, band_.cols, 0, channels, source_pixel_, padded_);
    const Index count = list_horizontal(padded_, source_pixel_);
    line.run(row_taps_, count, call_.stride * source_pixel_, call_.y.cols, out, [&] {
      if (!call_.paired) next_.step();
    });
  }

  template <typename Row>
  Index list_vertical(Index h, const Row& row) {
    Index count = 0;
    for (Index u = 0; u < call_.taps(); ++u) {
      const Index r = h * call_.stride - call_.padding + u * call_.dilation;
      if (r >= 0 && r < call_.x.rows) {
        const R* pixels = row(r);
        row_taps_[count++] = {pixels, u};
      }
    }
    return count;
  }

  Index list_horizontal(const R* band, Index pixel) {
    Index count = 0;
    for (Index v = band_.first_tap; v < band_.end_tap; ++v) {
      row_taps_[count++] = {band + (band_.left + band_.column(v)) * pixel, v};
    }
    return count;
  }

  // Dot products read channels in pairs. The one beside an odd number of them has zero weights on
  // both sides, which make NaN of an infinity: the second line would spread it.
  void clear_odd_channel(R* row, Index cols) const {
    const Index channels = call_.first.layout.out;
    if (Conv::readable_channels(channels) == channels) return;
    for (Index c = 0; c < cols; ++c) row[c * middle_pixel_ + channels] = R(0);
  }

  const R* source_row(Index n, Index r) {
    const Image<const T>& x = call_.x;
    if constexpr (std::is_same_v<T, R>) {
      if (in_place_) return x.data + n * x.n_stride + r * x.row_stride;
    }
    return ring_.get(n, r, [&](Index row, R* to) {
      copy_band<T, R>(x, n, row, 1, 0, x.cols, 0, x.channels, source_pixel_, to);
    });
  }

  // The ring holds rows of x that were copied, or of the middle map; beside it lies one padded row
  // of the other one.
  RowRing<R> make_ring() {
    const Index taps = call_.taps(), lanes = padded_lanes(call_.first.layout.out);
    const Index channels = Conv::readable_channels(call_.x.channels);
    if (call_.vertical_first) {
      const Index pixel = band_pixel<R>(channels, 1), row = call_.x.cols * pixel;
      in_place_ =
          std::is_same_v<T, R> && channels == call_.x.channels && !collides<R>(call_.x.col_stride);
      source_pixel_ = in_place_ ? call_.x.col_stride : pixel;
      if (call_.paired) {
        middle_pixel_ = band_pixel<R>(lanes, call_.stride);
        middle_ = scratch_.middle.get<R>(band_.cols * middle_pixel_);
      }
      R* data = in_place_ ? nullptr : source_memory(taps * row);
      return RowRing<R>(data, taps, row, call_.dilation);
    }
    source_pixel_ = band_pixel<R>(channels, call_.stride);
    padded_ = source_memory(band_.cols * source_pixel_);
    middle_pixel_ = band_pixel<R>(lanes, 1);
    const Index row = call_.y.cols * middle_pixel_;
    R* data = call_.paired ? scratch_.middle.get<R>(taps * row) : nullptr;
    return RowRing<R>(data, taps, row, call_.dilation);
  }

  // Channels that are read and do not exist are zero.
  R* source_memory(Index elements) {
    R* data = scratch_.source.get<R>(elements);
    if (Conv::readable_channels(call_.x.channels) != call_.x.channels) {
      std::memset(data, 0, static_cast<std::size_t>(elements) * sizeof(R));
    }
    return data;
  }

  // What the horizontal line reads left and right of the middle row stays zero.
  void clear_sides() {
    const auto clear = [&](Index begin, Index end) {
      std::memset(middle_ + begin * middle_pixel_, 0,
                  static_cast<std::size_t>((end - begin) * middle_pixel_) * sizeof(R));
    };
    clear(0, band_.left);
    clear(band_.left + call_.x.cols, band_.cols);
  }

  const PairCall<T>& call_;
  const RowBand band_;
  PairRows<T, R> rows_;
  ChainOrder order_;
  FactorizedScratch& scratch_;
  RowTap<R>* row_taps_;
  Conv first_, last_;
  RowPrefetch<T> next_;
  bool in_place_ = false;
  Index source_pixel_ = 0, middle_pixel_ = 0;
  R *middle_ = nullptr, *padded_ = nullptr;
  RowRing<R> ring_;  // last: making it sets what is above
};

template <typename Conv, typename T>
void run_direct(const PairCall<T>& call, int threads) {
  const Index positions = call.y.n * call.y.rows;
  if (positions == 0 || call.y.cols == 0 || call.y.channels == 0) return;
  threads = useful_threads(threads, call.multiply_adds());
  parallel(threads, [&](int thread, int of) {
    PairWorker<T, Conv>(call).run(part_of(positions, thread, of));
  });
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
