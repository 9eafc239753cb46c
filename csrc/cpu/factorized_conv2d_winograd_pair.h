#pragma once
// A pair of lines, or one alone, with Winograd's F(4, 3) along both: four rows of a chain at a
// time.

#include "cpu/factorized_conv2d_rows.h"
#include "cpu/factorized_conv2d_winograd.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Groups of four outputs that lie `dilation` apart, phase by phase.
struct WinogradGroups {
  Index size, dilation, phases, per_phase;

  WinogradGroups(Index outputs, Index dilation_) : size(outputs), dilation(dilation_) {
    phases = smaller(dilation, larger(outputs, 1));
    per_phase = ceil_div(ceil_div(larger(outputs, 1), dilation), kWinogradOutputs);
  }
  Index count() const { return phases * per_phase; }
  // May lie past the last output, in a phase with one output less than the first.
  Index first(Index group) const {
    return group / per_phase + group % per_phase * kWinogradOutputs * dilation;
  }
  // One past the last input that is read, the first output reading from input 0 on.
  Index inputs() const { return first(count() - 1) + (kWinogradPoints - 1) * dilation + 1; }
};

class WinogradWorker {
 public:
  explicit WinogradWorker(const PairCall<float>& call)
      : call_(call),
        rows_(call, kWinogradOutputs),
        row_groups_(call.y.rows, call.dilation),
        col_groups_(call.y.cols, call.dilation),
        first_(call.first),
        last_(call.last()),
        scratch_(factorized_scratch()),
        band_cols_(larger(call.padding + call.x.cols, col_groups_.inputs())),
        ring_(make_ring()) {
    Index memory = WinogradLine::memory(call.first.layout);
    if (call.paired) memory = larger(memory, WinogradLine::memory(call.second.layout));
    const Index zeros = larger(padded_lanes(call.x.channels), call.first.layout.lanes());
    memory_ = scratch_.transformed.get<float>(memory + zeros);
    zeros_ = memory_ + memory;
    std::memset(memory_ + memory, 0, static_cast<std::size_t>(zeros) * sizeof(float));
  }

  // Blocks of four rows of a chain, counted over all images.
  static Index blocks(const PairCall<float>& call) {
    return call.y.n * WinogradGroups(call.y.rows, call.dilation).count();
  }

  void run(Part blocks) {
    const Index per_image = row_groups_.count();
    for (Index b = blocks.begin; b < blocks.end; ++b) {
      const Index n = b / per_image, h = row_groups_.first(b % per_image);
      if (h < call_.y.rows) run_block(n, h);
    }
  }

 private:
  static constexpr int kRows = static_cast<int>(kWinogradOutputs);
  static constexpr int kInputs = static_cast<int>(kWinogradPoints);

  // Rows h, h + dilation, ... of y, as many as there are.
  void run_block(Index n, Index h) {
    RowOut<float> outs[kRows] = {};
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

  void vertical_first(Index n, Index h, const RowOut<float>* outs, int count) {
    const float* rows[kInputs];
    for (int i = 0; i < kInputs; ++i) {
      const Index r = h - call_.padding + i * call_.dilation;
      rows[i] = needed(r, i, count) ? source_row(n, r) : nullptr;
    }
    if (!call_.paired) {
      vertical(last_, rows, source_pixel_, call_.y.cols, outs);
      return;
    }
    RowOut<float> middle[kRows] = {};
    const float* inputs[kRows];
    for (int j = 0; j < count; ++j) {
      float* row = middle_ + j * band_cols_ * middle_pixel_;
      middle[j] = {row + call_.padding * middle_pixel_, middle_pixel_, nullptr, 0};
      inputs[j] = row;
    }
    vertical(first_, rows, source_pixel_, call_.x.cols, middle);
    horizontal(last_, inputs, middle_pixel_, count, outs);
  }

  void horizontal_first(Index n, Index h, const RowOut<float>* outs, int count) {
    if (!call_.paired) {
      const float* inputs[kRows];
      for (int j = 0; j < count; ++j) inputs[j] = padded_row(n, h + j * call_.dilation, j);
      horizontal(last_, inputs, source_pixel_, count, outs);
      return;
    }
    const float *rows[kInputs], *inputs[kInputs];
    RowOut<float> made[kInputs] = {};
    int missing = 0;
    for (int i = 0; i < kInputs; ++i) {
      const Index r = h - call_.padding + i * call_.dilation;
      if (!needed(r, i, count)) {
        rows[i] = nullptr;
        continue;
      }
      rows[i] = ring_.get(n, r, [&](Index row, float* to) {
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
  void vertical(const WinogradLine& line, const float* const* rows, Index pixel, Index cols,
                const RowOut<float>* outs) {
    line.run(cols, memory_, [&](Index c, WinogradItem& item) {
      for (int i = 0; i < kInputs; ++i) {
        item.in[i] = rows[i] == nullptr ? zeros_ : rows[i] + c * pixel;
      }
      for (int j = 0; j < kRows; ++j) fill_output(outs[j], c, j, item);
    });
  }

  // rows: `count`, from column -padding on.
  void horizontal(const WinogradLine& line, const float* const* rows, Index pixel, int count,
                  const RowOut<float>* outs) {
    const Index groups = col_groups_.count(), step = call_.dilation;
    line.run(count * groups, memory_, [&](Index q, WinogradItem& item) {
      const Index row = q / groups, c = col_groups_.first(q % groups);
      for (int i = 0; i < kInputs; ++i) item.in[i] = rows[row] + (c + i * step) * pixel;
      for (int j = 0; j < kRows; ++j) {
        const bool inside = c + j * step < call_.y.cols;
        fill_output(inside ? outs[row] : RowOut<float>{}, c + j * step, j, item);
      }
    });
  }

  static void fill_output(const RowOut<float>& out, Index c, int j, WinogradItem& item) {
    item.out[j] = out.data == nullptr ? nullptr : out.data + c * out.pixel;
    item.residual[j] = out.data == nullptr || out.residual == nullptr
                           ? nullptr
                           : out.residual + c * out.residual_pixel;
  }

  const float* source_row(Index n, Index r) {
    const Image<const float>& x = call_.x;
    if (in_place_) return x.data + n * x.n_stride + r * x.row_stride;
    return ring_.get(n, r, [&](Index row, float* to) {
      copy_band<float, float>(x, n, row, 1, 0, x.cols, 0, x.channels, source_pixel_, to);
    });
  }

  const float* padded_row(Index n, Index r, Index slot) {
    float* to = padded_ + slot * band_cols_ * source_pixel_;
    copy_band<float, float>(call_.x, n, r, 1, -call_.padding, band_cols_, 0, call_.x.channels,
                            source_pixel_, to);
    return to;
  }

  RowRing<float> make_ring() {
    const Index lanes = call_.first.layout.lanes();
    source_pixel_ = padded_lanes(call_.x.channels);
    middle_pixel_ = lanes;
    if (call_.vertical_first) {
      in_place_ = call_.x.channels % kNarrow == 0;
      if (in_place_) source_pixel_ = call_.x.col_stride;
      const Index row = call_.x.cols * source_pixel_;
      float* data = in_place_ ? nullptr : scratch_.source.get<float>(kInputs * row);
      if (call_.paired) clear_sides();
      return RowRing<float>(data, kInputs, row, call_.dilation);
    }
    padded_ = scratch_.source.get<float>(kInputs * band_cols_ * source_pixel_);
    const Index row = call_.y.cols * lanes;
    float* data = call_.paired ? scratch_.middle.get<float>(kInputs * row) : nullptr;
    return RowRing<float>(data, kInputs, row, call_.dilation);
  }

  // What the horizontal line reads left and right of the middle rows stays zero.
  void clear_sides() {
    middle_ = scratch_.middle.get<float>(kRows * band_cols_ * middle_pixel_);
    for (int j = 0; j < kRows; ++j) {
      float* row = middle_ + j * band_cols_ * middle_pixel_;
      const auto clear = [&](Index begin, Index end) {
        std::memset(row + begin * middle_pixel_, 0,
                    static_cast<std::size_t>((end - begin) * middle_pixel_) * sizeof(float));
      };
      clear(0, call_.padding);
      clear(call_.padding + call_.x.cols, band_cols_);
    }
  }

  const PairCall<float>& call_;
  PairRows<float, float> rows_;
  WinogradGroups row_groups_, col_groups_;
  WinogradLine first_, last_;
  FactorizedScratch& scratch_;
  Index band_cols_;
  bool in_place_ = false;
  Index source_pixel_ = 0, middle_pixel_ = 0;
  float *middle_ = nullptr, *padded_ = nullptr, *memory_ = nullptr;
  const float* zeros_ = nullptr;
  RowRing<float> ring_;  // last: making it sets what is above
};

inline void run_winograd(const PairCall<float>& call, int threads) {
  if (call.y.n * call.y.rows == 0 || call.y.cols == 0 || call.y.channels == 0) return;
  threads = useful_threads(threads, call.multiply_adds());
  const Index blocks = WinogradWorker::blocks(call);
  parallel(threads,
           [&](int thread, int of) { WinogradWorker(call).run(part_of(blocks, thread, of)); });
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
