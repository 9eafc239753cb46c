#pragma once
// A pair of lines, or one alone, with Winograd's F(m, 3) along both: m rows of a chain at a time.

#include "cpu/factorized_conv2d_rows.h"
#include "cpu/factorized_conv2d_winograd.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Groups of as many outputs as Line computes at a time, `dilation` apart, phase by phase.
template <typename Line>
struct WinogradGroups {
  Index size, dilation, phases, per_phase;

  WinogradGroups(Index outputs, Index dilation_) : size(outputs), dilation(dilation_) {
    phases = smaller(dilation, larger(outputs, 1));
    per_phase = ceil_div(ceil_div(larger(outputs, 1), dilation), Index{Line::kOutputs});
  }
  Index count() const { return phases * per_phase; }
  // May lie past the last output, in a phase with one output less than the first.
  Index first(Index group) const {
    return group / per_phase + group % per_phase * Line::kOutputs * dilation;
  }
  // One past the last input that is read, the first output reading from input 0 on.
  Index inputs() const { return first(count() - 1) + (Line::kPoints - 1) * dilation + 1; }
};

template <typename Line>
class WinogradWorker {
 public:
  using E = typename Line::Element;  // of the maps

  explicit WinogradWorker(const PairCall<E>& call)
      : call_(call),
        rows_(call, Line::kOutputs),
        row_groups_(call.y.rows, call.dilation),
        col_groups_(call.y.cols, call.dilation),
        first_(call.first),
        last_(call.last()),
        scratch_(factorized_scratch()),
        band_cols_(larger(call.padding + call.x.cols, col_groups_.inputs())),
        ring_(make_ring()) {
    for (Index g = 0; g < col_groups_.count(); ++g) first_cols_.push_back(col_groups_.first(g));
    Index memory = Line::memory(call.first.layout);
    if (call.paired) memory = larger(memory, Line::memory(call.second.layout));
    const Index zeros = larger(readable(call.x.channels), readable(call.first.layout.lanes()));
    memory_ = scratch_.transformed.get<E>(memory + zeros);
    zeros_ = memory_ + memory;
    clear(memory_ + memory, zeros);
  }

  // Blocks of four rows of a chain, counted over all images.
  static Index blocks(const PairCall<E>& call) {
    return call.y.n * WinogradGroups<Line>(call.y.rows, call.dilation).count();
  }

  void run(Part blocks) {
    const Index per_image = row_groups_.count();
    for (Index b = blocks.begin; b < blocks.end; ++b) {
      const Index n = b / per_image, h = row_groups_.first(b % per_image);
      if (h < call_.y.rows) run_block(n, h);
    }
  }

 private:
  static constexpr int kRows = Line::kOutputs;
  static constexpr int kInputs = Line::kPoints;

  static Index readable(Index channels) { return Line::readable_channels(channels); }
  static void clear(E* from, Index count) {
    std::memset(from, 0, static_cast<std::size_t>(count) * sizeof(E));
  }

  // Rows h, h + dilation, ... of y, as many as there are.
  void run_block(Index n, Index h) {
    RowOut<E> outs[kRows] = {};
    int count = 0;
    for (; count < kRows && h + count * call_.dilation < call_.y.rows; ++count) {
      outs[count] = rows_.open(n, h + count * call_.dilation, count);
    }
    if (call_.vertical_first) {
      vertical_first(n, h, outs, count);
    } else {
      horizontal_first(n, h, outs, count);
    }
    for (int j = 0; j < count; ++j) rows_.close(n, h + j * call_.dilation, outs[j]);
  }

  void vertical_first(Index n, Index h, const RowOut<E>* outs, int count) {
    const E* rows[kInputs];
    for (int i = 0; i < kInputs; ++i) {
      const Index r = h - call_.padding + i * call_.dilation;
      rows[i] = needed(r, i, count) ? source_row(n, r) : nullptr;
    }
    if (!call_.paired) {
      vertical(last_, rows, source_pixel_, call_.y.cols, outs);
      return;
    }
    RowOut<E> middle[kRows] = {};
    const E* inputs[kRows];
    for (int j = 0; j < count; ++j) {
      E* row = middle_ + j * band_cols_ * middle_pixel_;
      middle[j] = {row + call_.padding * middle_pixel_, middle_pixel_, nullptr, 0};
      inputs[j] = row;
    }
    vertical(first_, rows, source_pixel_, call_.x.cols, middle);
    horizontal(last_, inputs, middle_pixel_, count, outs);
  }

  void horizontal_first(Index n, Index h, const RowOut<E>* outs, int count) {
    if (!call_.paired) {
      const E* inputs[kRows];
      for (int j = 0; j < count; ++j) inputs[j] = padded_row(n, h + j * call_.dilation, j);
      horizontal(last_, inputs, source_pixel_, count, outs);
      return;
    }
    const E *rows[kInputs], *inputs[kInputs];
    RowOut<E> made[kInputs] = {};
    int missing = 0;
    for (int i = 0; i < kInputs; ++i) {
      const Index r = h - call_.padding + i * call_.dilation;
      if (!needed(r, i, count)) {
        rows[i] = nullptr;
        continue;
      }
      rows[i] = ring_.get(n, r, [&](Index row, E* to) {
        inputs[missing] = padded_row(n, row, missing);
        made[missing++] = {to, middle_pixel_, nullptr, 0};
      });
    }
    horizontal(first_, inputs, source_pixel_, missing, made);
    vertical(last_, rows, middle_pixel_, call_.y.cols, outs);
  }

  // Whether input i of a block, row r, exists and belongs to one of its first `count` outputs.
  bool needed(Index r, int i, int count) const {
    return r >= 0 && r < call_.x.rows && i < count + static_cast<int>(kWinogradTaps) - 1;
  }

  // rows: six, null where zero; outs: four, those with null data do not exist.
  void vertical(const Line& line, const E* const* rows, Index pixel, Index cols,
                const RowOut<E>* outs) {
    line.run(cols, memory_, [&](Index c, typename Line::Item& item) {
      for (int i = 0; i < kInputs; ++i) {
        item.in[i] = rows[i] == nullptr ? zeros_ : rows[i] + c * pixel;
      }
      for (int j = 0; j < kRows; ++j) fill_output(outs[j], c, j, item);
    });
  }

  // rows: `count`, from column -padding on.
  void horizontal(const Line& line, const E* const* rows, Index pixel, int count,
                  const RowOut<E>* outs) {
    const Index groups = col_groups_.count(), step = call_.dilation;
    line.run(count * groups, memory_, [&](Index q, typename Line::Item& item) {
      Index row = 0;  // of a few: cheaper than a division
      for (; q >= groups; q -= groups) ++row;
      const Index c = first_cols_[static_cast<std::size_t>(q)];
      for (int i = 0; i < kInputs; ++i) item.in[i] = rows[row] + (c + i * step) * pixel;
      for (int j = 0; j < kRows; ++j) {
        const bool inside = c + j * step < call_.y.cols;
        fill_output(inside ? outs[row] : RowOut<E>{}, c + j * step, j, item);
      }
    });
  }

  static void fill_output(const RowOut<E>& out, Index c, int j, typename Line::Item& item) {
    item.out[j] = out.data == nullptr ? nullptr : out.data + c * out.pixel;
    item.residual[j] = out.data == nullptr || out.residual == nullptr
                           ? nullptr
                           : out.residual + c * out.residual_pixel;
  }

  const E* source_row(Index n, Index r) {
    const Image<const E>& x = call_.x;
    if (in_place_) return x.data + n * x.n_stride + r * x.row_stride;
    return ring_.get(n, r, [&](Index row, E* to) {
      copy_band<E, E>(x, n, row, 1, 0, x.cols, 0, x.channels, source_pixel_, to);
    });
  }

  const E* padded_row(Index n, Index r, Index slot) {
    E* to = padded_ + slot * band_cols_ * source_pixel_;
    copy_band<E, E>(call_.x, n, r, 1, -call_.padding, band_cols_, 0, call_.x.channels,
                    source_pixel_, to);
    return to;
  }

  RowRing<E> make_ring() {
    source_pixel_ = readable(call_.x.channels);
    middle_pixel_ = readable(call_.first.layout.lanes());
    if (call_.vertical_first) {
      in_place_ = call_.x.channels == source_pixel_;
      if (in_place_) source_pixel_ = call_.x.col_stride;
      const Index row = call_.x.cols * source_pixel_;
      E* data = in_place_ ? nullptr : source_memory(kInputs * row);
      if (call_.paired) clear_sides();
      return RowRing<E>(data, kInputs, row, call_.dilation);
    }
    padded_ = source_memory(kInputs * band_cols_ * source_pixel_);
    const Index row = call_.y.cols * middle_pixel_;
    E* data = call_.paired ? scratch_.middle.get<E>(kInputs * row) : nullptr;
    if (call_.paired && middle_pixel_ != call_.first.layout.lanes()) clear(data, kInputs * row);
    return RowRing<E>(data, kInputs, row, call_.dilation);
  }

  // Channels that are read and do not exist are zero.
  E* source_memory(Index elements) {
    E* data = scratch_.source.get<E>(elements);
    if (source_pixel_ != call_.x.channels) clear(data, elements);
    return data;
  }

  // What the horizontal line reads left and right of the middle rows stays zero.
  void clear_sides() {
    middle_ = scratch_.middle.get<E>(kRows * band_cols_ * middle_pixel_);
    if (middle_pixel_ != call_.first.layout.lanes()) {
      clear(middle_, kRows * band_cols_ * middle_pixel_);
      return;
    }
    const Index end = call_.padding + call_.x.cols;
    for (int j = 0; j < kRows; ++j) {
      E* row = middle_ + j * band_cols_ * middle_pixel_;
      clear(row, call_.padding * middle_pixel_);
      clear(row + end * middle_pixel_, (band_cols_ - end) * middle_pixel_);
    }
  }

  const PairCall<E>& call_;
  PairRows<E, E> rows_;
  WinogradGroups<Line> row_groups_, col_groups_;
  std::vector<Index> first_cols_;  // of the groups of columns
  Line first_, last_;
  FactorizedScratch& scratch_;
  Index band_cols_;
  bool in_place_ = false;
  Index source_pixel_ = 0, middle_pixel_ = 0;
  E *middle_ = nullptr, *padded_ = nullptr, *memory_ = nullptr;
  const E* zeros_ = nullptr;
  RowRing<E> ring_;  // last: making it sets what is above
};

template <typename Line>
void run_winograd(const PairCall<typename Line::Element>& call, int threads) {
  if (call.y.n * call.y.rows == 0 || call.y.cols == 0 || call.y.channels == 0) return;
  threads = useful_threads(threads, call.multiply_adds());
  const Index blocks = WinogradWorker<Line>::blocks(call);
  parallel(threads, [&](int thread, int of) {
    WinogradWorker<Line>(call).run(part_of(blocks, thread, of));
  });
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
