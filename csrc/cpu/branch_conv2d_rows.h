#pragma once
// Products of single rows with the weights of a branch: 1x1 kernels on maps of few pixels (linear
// layers have one). Rows of many pairs are gathered, so that the tile is full.

#include "cpu/branch_conv2d_maps.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Rows of one branch at a time: cells[row][lane] = init[lane] + sum_k rows[row][k] *
// weights[k][lane].
template <typename A>
class RowProduct {
 public:
  explicit RowProduct(const BranchLayout& layout)
      : layout_(layout),
        channels_(layout.groups * layout.rows),
        pixel_(band_pixel<A>(channels_, 1)),
        scratch_(thread_scratch()),
        cells_(scratch_.cells.get<A>((kTilePixels + 1) * kPanel)),
        init_(cells_ + kTilePixels * kPanel) {}

  // How many rows should be multiplied together, at most.
  static Index max_rows(const BranchLayout& layout) {
    constexpr Index kBytes = 128 * 1024;
    const Index row_bytes = layout.groups * layout.rows * Index{sizeof(A)};
    return larger(smaller(kBytes / larger(row_bytes, 1), 4 * kTilePixels), kTilePixels);
  }

  // fill(row, to) writes a row; begin(channels, init) a panel's [kPanel] start of the sum;
  // take(row, channels, cells) reads a row's lanes of one panel.
  template <typename Fill, typename Begin, typename Take>
  void run(Index rows, Part panels, const A* weights, const Fill& fill, const Begin& begin,
           const Take& take) {
    A* from = scratch_.band.get<A>(rows * pixel_);
    for (Index r = 0; r < rows; ++r) fill(r, from + r * pixel_);
    const Index tiles = ceil_div(rows, kTilePixels);
    for (Index p = panels.begin; p < panels.end; ++p) {
      const PanelChannels channels = panel_channels(layout_, p);
      begin(channels, init_);
      const Tap<A> tap{from + channels.source, weights + p * layout_.panel_stride(), layout_.rows};
      for (Index t = 0; t < tiles; ++t) {
        const Part part = part_of(rows, static_cast<int>(t), static_cast<int>(tiles));
        run_tiles(tap, part, channels.lanes);
        for (Index r = part.begin; r < part.end; ++r) {
          take(r, channels, cells_ + (r - part.begin) * kPanel);
        }
      }
    }
  }

 private:
  void run_tiles(const Tap<A>& tap, Part rows, Index lanes) {
    TileCall<A> call{};
    call.taps = &tap;
    call.tap_count = 1;
    call.a_offset = rows.begin * pixel_;
    call.a_pixel = pixel_;
    call.a_step = 1;
    call.b_step = layout_.width;
    call.out_pixel = kPanel;
    const Index vecs = ceil_div(lanes, kLanes<A>);
    for (Index v = 0; v < vecs; v += kTileVecs) {
      call.b_offset = v * kLanes<A>;
      call.init = init_ + call.b_offset;
      call.out = cells_ + call.b_offset;
      run_tile<DenseTile>(static_cast<int>(rows.end - rows.begin),
                          static_cast<int>(smaller(kTileVecs, vecs - v)), call);
    }
  }

  BranchLayout layout_;
  Index channels_, pixel_;
  ThreadScratch& scratch_;
  A *cells_, *init_;
};

// The same work as MapConv's, for a kernel of one pixel without padding. `scale`, by pair, may be
// null; it multiplies what a visit adds.
template <typename T, typename D>
class RowConv {
 public:
  using A = Accumulator<T>;
  static constexpr Index kFewPixels = 8;

  static bool suits(const Plan& plan, const BranchLayout& layout, const Image<const T>& source) {
    return !layout.depthwise && layout.taps == 1 && plan.phases.size() == 1 &&
           plan.offsets.size() == 1 && plan.dy_min == 0 && plan.dx_min == 0 &&
           plan.dest_step_h == 1 && plan.dest_step_w == 1 && plan.rows * plan.cols < kFewPixels &&
           (plan.rows - 1) * plan.step_h < source.rows &&
           (plan.cols - 1) * plan.step_w < source.cols;
  }

  RowConv(const PairMaps<const T>& source, const PairMaps<D>& dest, const Plan& plan,
          const BranchLayout& layout, const T* bias, const T* scale)
      : source_(source),
        dest_(dest),
        plan_(plan),
        layout_(layout),
        bias_(bias),
        scale_(scale),
        pixels_(plan.rows * plan.cols) {}

  bool copies_source() const { return false; }  // in the sense that sharing a copy would pay
  Index group() const { return larger(RowProduct<A>::max_rows(layout_) / larger(pixels_, 1), 1); }
  double multiply_adds() const { return double(layout_.elements()) * double(pixels_); }

  class Worker {
   public:
    Worker(const RowConv& conv, const PairMaps<D>& dest)
        : conv_(conv), dest_(dest), product_(conv.layout_) {}

    // The visits are of one branch.
    void run(const Visit* visits, Index count, Part panels, const A* weights, Index branch_stride) {
      if (count == 0) return;
      const Index pixels = conv_.pixels_, branch = visits[0].branch;
      const Image<const T>& source = conv_.source_.map;
      product_.run(
          count * pixels, panels, weights + branch * branch_stride,
          [&](Index row, A* to) {
            const Index offset = conv_.source_.offset(visits[row / pixels].pair);
            widen_row(source.data + offset + conv_.source_pixel(row % pixels), to, source.channels);
          },
          [&](const PanelChannels& channels, A* init) {
            fill_init(conv_.bias_, dest_.map.channels, branch, channels.dest, channels.lanes, init);
          },
          [&](Index row, const PanelChannels& channels, const A* cells) {
            const Visit& visit = visits[row / pixels];
            D* to = dest_.map.data + dest_.offset(visit.pair) + conv_.dest_pixel(row % pixels) +
                    channels.dest;
            const A scale = conv_.scale_ == nullptr ? A(1) : widen(conv_.scale_[visit.pair]);
            for (Index l = 0; l < channels.lanes; ++l) {
              put_lane(scale * cells[l], visit.first, to[l]);
            }
          });
    }

   private:
    const RowConv& conv_;
    const PairMaps<D>& dest_;
    RowProduct<A> product_;
  };

 private:
  Index source_pixel(Index i) const {
    return i / plan_.cols * plan_.step_h * source_.map.row_stride +
           i % plan_.cols * plan_.step_w * source_.map.col_stride;
  }
  Index dest_pixel(Index i) const {
    return i / plan_.cols * dest_.map.row_stride + i % plan_.cols * dest_.map.col_stride;
  }

  PairMaps<const T> source_;
  PairMaps<D> dest_;
  const Plan& plan_;
  BranchLayout layout_;
  const T *bias_, *scale_;
  Index pixels_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
