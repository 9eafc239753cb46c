#pragma once
// Convolutions of single maps, each with the panels of one branch. Several maps of a branch are run
// together, panel by panel, so that a panel stays in the first-level cache.

#include <type_traits>

#include "cpu/branch_conv2d_layout.h"
#include "cpu/branch_conv2d_pairs.h"
#include "cpu/tile.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// A branch's bias at the lanes of a panel, or zeros.
template <typename T, typename A>
inline void fill_init(const T* bias, Index channels, Index branch, Index channel, Index lanes,
                      A* init) {
  for (Index l = 0; l < kPanel; ++l) init[l] = A(0);
  if (bias == nullptr) return;
  const T* from = bias + branch * channels + channel;
  for (Index l = 0; l < lanes; ++l) init[l] = widen(from[l]);
}

template <typename A, typename D>
inline void put_lane(A value, bool first, D& to) {
  if constexpr (std::is_same_v<A, D>) {
    to = first ? value : to + value;
  } else {
    narrow(value, to);  // never a sum: sums are kept in A
  }
}

// Which channels a panel reads and writes.
struct PanelChannels {
  Index source, dest, lanes;
};
inline PanelChannels panel_channels(const BranchLayout& layout, Index panel) {
  const Index group = panel / layout.panels, lane = (panel - group * layout.panels) * layout.width;
  return {layout.depthwise ? lane : group * layout.rows, group * layout.lanes + lane,
          smaller(layout.width, layout.lanes - lane)};
}

// Visits that are run together, at most, and the memory for their bands: with the panel in use it
// fits a second-level cache of 1 MB.
constexpr Index kMaxGroup = 64, kGroupBytes = 256 * 1024;

// D is T, or the accumulator of T where destinations are sums of several visits.
template <typename Tile, typename T, typename D>
class MapConv {
 public:
  using A = Accumulator<T>;

  MapConv(const PairMaps<const T>& source, const PairMaps<D>& dest, const Plan& plan,
          const BranchLayout& layout, const T* bias)
      : source_(source), dest_(dest), plan_(plan), layout_(layout), bias_(bias) {
    rows_ = plan.rows;
    cols_ = plan.cols;
    in_place_ = reads_in_place();
    if (in_place_ && one_row_of_pixels()) flatten();
    pixel_ = band_pixel<A>(source_.map.channels, plan_.step_w);
    const Index row_bytes = plan_.step_h * band_cols() * pixel_ * Index{sizeof(A)};
    band_cells_ = larger(kGroupBytes / larger(row_bytes, 1), 1);
    // Each panel goes over all maps of a group, and writes a part of every pixel.
    const Index map_bytes =
        (band_elements(rows_) + dest.map.rows * dest.map.cols * dest.map.channels) *
        Index{sizeof(A)};
    group_ =
        band_cells_ < rows_ ? 1 : larger(smaller(kGroupBytes / larger(map_bytes, 1), kMaxGroup), 1);
  }

  bool copies_source() const { return !in_place_; }
  Index group() const { return group_; }  // visits that can be run together, at most
  double multiply_adds() const {          // of a visit
    return double(layout_.elements()) * double(rows_ * cols_);
  }

  class Worker {
   public:
    Worker(const MapConv& conv, const PairMaps<D>& dest)
        : conv_(conv),
          dest_(dest),
          scratch_(thread_scratch()),
          cells_(scratch_.cells.template get<A>((kTilePixels + 1) * kPanel)),
          init_(cells_ + kTilePixels * kPanel) {}

    // Branch b's weights are at weights + b * branch_stride.
    void run(const Visit* visits, Index count, Part panels, const A* weights, Index branch_stride) {
      for (Index q = 0; q < conv_.rows_; q += conv_.band_cells_) {
        const Index rows = smaller(conv_.band_cells_, conv_.rows_ - q);
        list_taps(load(visits, count, q, rows), weights);
        for (Index p = panels.begin; p < panels.end; ++p) {
          for (Index i = 0; i < count; ++i) {
            run_panel(visits[i], offsets_[i], p, {q, q + rows}, branch_stride);
          }
        }
      }
    }

   private:
    // Sets offsets_, the place of each source from the band that is returned.
    Band<A> load(const Visit* visits, Index count, Index q, Index rows) {
      const Plan& plan = conv_.plan_;
      const Image<const T>& map = conv_.source_.map;
      if constexpr (std::is_same_v<T, A>) {
        if (conv_.in_place_) {
          for (Index i = 0; i < count; ++i) {
            offsets_[i] =
                conv_.source_.offset(visits[i].pair) + q * plan.step_h * conv_.row_stride_;
          }
          return {map.data + plan.dy_min * map.row_stride + plan.dx_min * map.col_stride,
                  conv_.row_stride_, map.col_stride};
        }
      }
      const Index cols = conv_.band_cols(), pixel = conv_.pixel_;
      const Index height = plan.band_rows(rows), elements = height * cols * pixel;
      // Depth-wise tiles read whole vectors: past the last pixel by less than a panel.
      A* band = scratch_.band.template get<A>(count * elements + kPanel);
      Index slots = 0;
      for (Index i = 0; i < count; ++i) {
        const Index offset = conv_.source_.offset(visits[i].pair);
        if (i > 0 && offset == conv_.source_.offset(visits[i - 1].pair)) {
          offsets_[i] = offsets_[i - 1];
          continue;
        }
        Image<const T> one = map;
        one.data += offset;
        copy_band<T, A>(one, 0, q * plan.step_h + plan.dy_min, height, plan.dx_min, cols, 0,
                        map.channels, pixel, band + slots * elements);
        offsets_[i] = slots++ * elements;
      }
      return {band, cols * pixel, pixel};
    }

    // Neighbouring taps whose pixels and weights both follow each other become one longer sum.
    void list_taps(const Band<A>& band, const A* weights) {
      const Plan& plan = conv_.plan_;
      const BranchLayout& layout = conv_.layout_;
      band_ = band;
      taps_ = scratch_.taps.template get<Tap<A>>(larger(Index(plan.offsets.size()), 1));
      tap_ends_.clear();
      Index count = 0;
      for (const Phase& phase : plan.phases) {
        const Index begin = count;
        for (Index i = phase.offsets_begin; i < phase.offsets_end; ++i) {
          const Offset& o = plan.offsets[i];
          const A* a = band.data + (o.dy - plan.dy_min) * band.row_stride +
                       (o.dx - plan.dx_min) * band.col_stride;
          const A* b = weights + o.weight_tap * layout.tap_stride();
          if (Tile::kMergesTaps && count > begin) {
            Tap<A>& before = taps_[count - 1];
            if (before.a + before.k == a && before.b + before.k * layout.width == b) {
              before.k += layout.rows;
              continue;
            }
          }
          taps_[count++] = {a, b, layout.rows};
        }
        tap_ends_.push_back(count);
      }
    }

    void run_panel(const Visit& visit, Index offset, Index panel, Part rows, Index branch_stride) {
      const BranchLayout& layout = conv_.layout_;
      const PanelChannels channels = panel_channels(layout, panel);
      if (visit.branch != init_branch_ || panel != init_panel_) {
        fill_init(conv_.bias_, dest_.map.channels, visit.branch, channels.dest, channels.lanes,
                  init_);
        init_branch_ = visit.branch;
        init_panel_ = panel;
      }
      TileCall<A> call{};
      call.a_pixel = conv_.plan_.step_w * band_.col_stride;
      call.a_step = 1;
      call.b_step = layout.width;
      D* map = dest_.map.data + dest_.offset(visit.pair) + channels.dest;
      Index begin = 0;
      for (std::size_t f = 0; f < conv_.plan_.phases.size(); ++f) {
        const Phase& phase = conv_.plan_.phases[f];
        call.taps = taps_ + begin;
        call.tap_count = tap_ends_[f] - begin;
        begin = tap_ends_[f];
        const Index end = smaller(conv_.rows_of(phase), rows.end);
        for (Index lane = 0; lane < channels.lanes; lane += kTileVecs * kLanes<A>) {
          const int lanes = static_cast<int>(smaller(channels.lanes - lane, kTileVecs * kLanes<A>));
          const Index source = offset + channels.source + (Tile::kLanesAreChannels ? lane : 0);
          call.b_offset = visit.branch * branch_stride + panel * layout.panel_stride() + lane;
          call.init = init_ + lane;
          for (Index r = rows.begin; r < end; ++r) {
            call.a_offset = source + (r - rows.begin) * conv_.plan_.step_h * band_.row_stride;
            run_row(call, phase, r, lanes, visit.first, map + lane);
          }
        }
      }
    }

    void run_row(TileCall<A>& call, const Phase& phase, Index row, int lanes, bool first, D* map) {
      const Plan& plan = conv_.plan_;
      const Index pixel = plan.dest_step_w * dest_.map.col_stride;
      D* out = map + (phase.first_row + row * plan.dest_step_h) * conv_.dest_row_stride_ +
               phase.first_col * dest_.map.col_stride;
      const int vecs = (lanes + kLanes<A> - 1) / kLanes<A>;
      const bool direct = std::is_same_v<D, A> && lanes == vecs * kLanes<A>;
      const A* init = call.init;
      if (direct && !first) call.init = nullptr;
      call.out_pixel = direct ? pixel : kPanel;
      const Index cols = conv_.cols_of_row(phase, row), offset = call.a_offset;
      const Index tiles = ceil_div(cols, kTilePixels);
      for (Index t = 0; t < tiles; ++t) {
        const Part part = part_of(cols, static_cast<int>(t), static_cast<int>(tiles));
        const int pixels = static_cast<int>(part.end - part.begin);
        D* to = out + part.begin * pixel;
        call.a_offset = offset + part.begin * call.a_pixel;
        call.out = cells_;
        if constexpr (std::is_same_v<D, A>) {
          if (direct) call.out = to;
        }
        run_tile<Tile>(pixels, vecs, call);
        if (direct) continue;
        for (int p = 0; p < pixels; ++p, to += pixel) {
          for (int l = 0; l < lanes; ++l) put_lane(cells_[p * kPanel + l], first, to[l]);
        }
      }
      call.init = init;
    }

    const MapConv& conv_;
    const PairMaps<D>& dest_;
    ThreadScratch& scratch_;
    A *cells_, *init_;
    Tap<A>* taps_ = nullptr;
    std::vector<Index> tap_ends_;  // of each phase
    Band<A> band_{};
    Index offsets_[kMaxGroup] = {};
    Index init_branch_ = -1, init_panel_ = -1;
  };

 private:
  Index band_cols() const { return (cols_ - 1) * plan_.step_w + plan_.dx_max - plan_.dx_min + 1; }
  Index band_elements(Index rows) const { return plan_.band_rows(rows) * band_cols() * pixel_; }
  Index rows_of(const Phase& phase) const { return flat_ ? rows_ : phase.rows; }
  Index cols_of_row(const Phase& phase, Index row) const {
    if (!flat_) return phase.cols;
    return row == rows_ - 1 ? flat_last_cols_ : cols_;
  }

  // True where no tile reads outside of the map and nothing has to be converted.
  bool reads_in_place() {
    row_stride_ = source_.map.row_stride;
    dest_row_stride_ = dest_.map.row_stride;
    return std::is_same_v<T, A> && Tile::kReadsInPlace && plan_.dy_min >= 0 && plan_.dx_min >= 0 &&
           (rows_ - 1) * plan_.step_h + plan_.dy_max < source_.map.rows &&
           (cols_ - 1) * plan_.step_w + plan_.dx_max < source_.map.cols &&
           !collides<A>(plan_.step_w * source_.map.col_stride);
  }

  // Pointwise, stride 1, and all pixels of a map evenly spaced.
  bool one_row_of_pixels() const {
    const auto even = [](const auto& map) {
      return map.rows == 1 || map.row_stride == map.cols * map.col_stride;
    };
    return plan_.offsets.size() == 1 && plan_.phases.size() == 1 && plan_.dy_min == 0 &&
           plan_.dx_min == 0 && plan_.step_h == 1 && plan_.step_w == 1 && plan_.dest_step_h == 1 &&
           plan_.dest_step_w == 1 && source_.map.rows == rows_ && source_.map.cols == cols_ &&
           even(source_.map) && even(dest_.map);
  }

  // Maps of 7 or 8 pixels a row would leave the tile half empty: cut the pixels of a map into rows
  // of whole tiles instead.
  void flatten() {
    const Index pixels = rows_ * cols_;
    flat_ = true;
    cols_ = smaller(pixels, 4 * kTilePixels);
    rows_ = ceil_div(pixels, larger(cols_, 1));
    flat_last_cols_ = pixels - (rows_ - 1) * cols_;
    row_stride_ = cols_ * source_.map.col_stride;
    dest_row_stride_ = cols_ * dest_.map.col_stride;
  }

  PairMaps<const T> source_;
  PairMaps<D> dest_;  // its strides; a Worker has the place
  const Plan& plan_;
  BranchLayout layout_;
  const T* bias_;
  bool in_place_ = false, flat_ = false;
  Index rows_, cols_, flat_last_cols_ = 0;      // of the cells
  Index row_stride_ = 0, dest_row_stride_ = 0;  // from one row of cells to the next
  Index pixel_ = 0, band_cells_ = 1, group_ = 1;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
