#pragma once
// The loops around the register tile, for every direction that writes an image: cell rows in bands
// that fit the second-level cache, panels of 32 output channels, tiles of pixels.

#include <type_traits>

#include "cpu/image.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Weights of kPanel neighbouring channels of the destination, [taps][rows][kPanel].
template <typename A>
struct Panel {
  const A* weights;
  Index tap_stride;
  Index sum;             // source channels that are summed
  Index source_channel;  // the first of them
  Index dest_channel;    // channel of lane 0; only lanes in [first_lane, last_lane) exist
  int first_lane, last_lane;
  const A* init;  // [kPanel]
};

// With the panel in use this fits a second-level cache of 1 MB.
constexpr Index kBandBytes = 384 * 1024;
// What is left of it for weights that are read again and again.
constexpr Index kWeightBytes = 640 * 1024;

// `Panels` makes the Panel of a number in [0, count()); `gathers` says that making one is work,
// so that it is made once and used for all images.
template <typename Tile, typename T, typename Panels>
class ImageConv {
 public:
  using A = Accumulator<T>;

  ImageConv(const Image<const T>& source, const Image<T>& dest, const Plan& plan, Panels& panels)
      : source_(source), dest_(dest), plan_(plan), panels_(panels), in_place_(reads_in_place()) {
    if (in_place_ && one_row_of_pixels()) flatten();
    const Index row_bytes = plan_.step_h * band_cols() * source_.channels * Index{sizeof(A)};
    band_cells_ = larger(kBandBytes / larger(row_bytes, 1), 1);
  }

  void run(int threads) {
    const Index rows = dest_.n * rows_;
    if (rows == 0 || cols_ == 0 || panels_.count() == 0) return;
    threads = useful_threads(threads, panels_.multiply_adds_per_pixel() * double(rows * cols_));
    const bool by_panel = splits_by_panel(threads);
    parallel(threads, [&](int thread, int of) {
      const Part panels =
          by_panel ? part_of(panels_.count(), thread, of) : Part{0, panels_.count()};
      const Part cells = by_panel ? Part{0, rows} : part_of(rows, thread, of);
      Worker(*this).run(panels, cells);
    });
  }

 private:
  // The state of one thread: which band is in its scratch.
  class Worker {
   public:
    explicit Worker(const ImageConv& conv)
        : conv_(conv), scratch_(thread_scratch()), cells_(scratch_.cells.get<A>(kCellElements)) {}

    void run(Part panels, Part cells) {
      if (!Panels::gathers) {
        run_cells(panels, cells);
        return;
      }
      for (Index j = panels.begin; j < panels.end; ++j) run_cells({j, j + 1}, cells);
    }

   private:
    static constexpr Index kCellElements = (kTilePixels + 1) * kPanel;

    void run_cells(Part panels, Part cells) {
      for (Index r = cells.begin; r < cells.end;) {
        const Index n = r / conv_.rows_, q = r % conv_.rows_;
        const Index rows = smaller(smaller(conv_.rows_ - q, cells.end - r), conv_.band_cells_);
        const Band<A> band = conv_.in_place_ ? conv_.band_in_place(n, q) : copied_band(n, q, rows);
        r += rows;
        if (Tile::kPrefetches) {
          prefetch_band(r, cells.end, (panels.end - panels.begin) * rows * conv_.row_tiles());
        }
        for (Index j = panels.begin; j < panels.end; ++j) run_panel(band, n, q, rows, panel(j));
      }
    }

    // A gathered panel stays for all the cells that are computed with it.
    const Panel<A>& panel(Index j) {
      if (!Panels::gathers || j != panel_number_) {
        panel_ = conv_.panels_.open(j, scratch_.panel, cells_ + kTilePixels * kPanel);
        panel_number_ = j;
      }
      return panel_;
    }

    Band<A> copied_band(Index n, Index q, Index rows) {
      const Plan& plan = conv_.plan_;
      const Index channels = conv_.source_.channels, cols = conv_.band_cols();
      const Index pixel = band_pixel<A>(channels, plan.step_w);
      const Index height = plan.band_rows(rows);
      // Depth-wise tiles read whole vectors: past the last pixel by less than a panel.
      A* data = scratch_.band.get<A>(height * cols * pixel + kPanel);
      if (n != band_n_ || q != band_q_ || rows != band_rows_) {
        copy_band<T, A>(conv_.source_, n, q * plan.step_h + plan.dy_min, height, plan.dx_min, cols,
                        0, channels, pixel, data);
        band_n_ = n;
        band_q_ = q;
        band_rows_ = rows;
      }
      return {data, cols * pixel, pixel};
    }

    // While the present band is computed in `tiles` tiles, the next one is brought near: read all
    // at once by copied_band, it would come at the latency of the memory.
    void prefetch_band(Index r, Index end, Index tiles) {
      next_.stop();
      if (conv_.in_place_ || r == end) return;
      const Index n = r / conv_.rows_, q = r % conv_.rows_;
      const Index rows = smaller(smaller(conv_.rows_ - q, end - r), conv_.band_cells_);
      const Index first = larger(q * conv_.plan_.step_h + conv_.plan_.dy_min, 0);
      const Index height = smaller(conv_.plan_.band_rows(rows), conv_.source_.rows - first);
      if (height > 0) next_.start(conv_.source_, n, first, height, tiles);
    }

    void run_panel(const Band<A>& band, Index n, Index q, Index rows, const Panel<A>& panel) {
      Tap<A>* taps = scratch_.taps.get<Tap<A>>(larger(Index(conv_.plan_.offsets.size()), 1));
      for (const Phase& phase : conv_.plan_.phases) {
        const Index count = list_taps(band, panel, phase, taps);
        const Index end = smaller(conv_.rows_of(phase), q + rows);
        const int first = panel.first_lane / kLanes<A>;
        const int last = (panel.last_lane + kLanes<A> - 1) / kLanes<A>;
        for (int v = first; v < last; v += kTileVecs) {
          const int vecs = static_cast<int>(smaller(kTileVecs, last - v));
          for (Index r = q; r < end; ++r) {
            run_row(band, n, r, r - q, panel, phase, taps, count, v, vecs);
          }
        }
      }
    }

    // Neighbouring taps whose pixels and weights both follow each other become one longer sum.
    Index list_taps(const Band<A>& band, const Panel<A>& panel, const Phase& phase, Tap<A>* taps) {
      const Plan& plan = conv_.plan_;
      Index count = 0;
      for (Index i = phase.offsets_begin; i < phase.offsets_end; ++i) {
        const Offset& o = plan.offsets[i];
        const A* a = band.data + (o.dy - plan.dy_min) * band.row_stride +
                     (o.dx - plan.dx_min) * band.col_stride + panel.source_channel;
        const A* b = panel.weights + o.weight_tap * panel.tap_stride;
        if (Tile::kMergesTaps && count > 0) {
          Tap<A>& before = taps[count - 1];
          if (before.a + before.k == a && before.b + before.k * kPanel == b) {
            before.k += panel.sum;
            continue;
          }
        }
        taps[count++] = {a, b, panel.sum};
      }
      return count;
    }

    void run_row(const Band<A>& band, Index n, Index row, Index band_row, const Panel<A>& panel,
                 const Phase& phase, const Tap<A>* taps, Index tap_count, int vec, int vecs) {
      const Plan& plan = conv_.plan_;
      const Image<T>& dest = conv_.dest_;
      const int lane = vec * kLanes<A>, lanes = vecs * kLanes<A>;
      const bool direct =
          std::is_same_v<T, A> && lane >= panel.first_lane && lane + lanes <= panel.last_lane;
      const Index dest_pixel = plan.dest_step_w * dest.col_stride;
      T* out = dest.data + n * dest.n_stride +
               (phase.first_row + row * plan.dest_step_h) * dest.row_stride +
               phase.first_col * dest.col_stride;
      TileCall<A> call{};
      call.taps = taps;
      call.tap_count = tap_count;
      call.b_offset = lane;
      call.a_pixel = plan.step_w * band.col_stride;
      call.a_step = 1;
      call.b_step = kPanel;
      call.init = panel.init + lane;
      call.out_pixel = direct ? dest_pixel : kPanel;
      const Index first_pixel =
          band_row * plan.step_h * band.row_stride + (Tile::kLanesAreChannels ? lane : 0);
      const Index cols = conv_.cols_of_row(phase, row);
      const Index tiles = ceil_div(cols, kTilePixels);
      for (Index t = 0; t < tiles; ++t) {
        const Part part = part_of(cols, static_cast<int>(t), static_cast<int>(tiles));
        const int pixels = static_cast<int>(part.end - part.begin);
        call.a_offset = first_pixel + part.begin * call.a_pixel;
        T* tile_out = out + part.begin * dest_pixel;
        if constexpr (std::is_same_v<T, A>) {
          call.out = direct ? tile_out + panel.dest_channel + lane : cells_;
        } else {
          call.out = cells_;
        }
        if (Tile::kPrefetches) next_.step();
        run_tile<Tile>(pixels, vecs, call);
        if (!direct) store_lanes(panel, lane, lanes, pixels, tile_out, dest_pixel);
      }
    }

    void store_lanes(const Panel<A>& panel, int lane, int lanes, int pixels, T* out, Index pixel) {
      const int first = static_cast<int>(larger(panel.first_lane, lane));
      const int last = static_cast<int>(smaller(panel.last_lane, lane + lanes));
      for (int p = 0; p < pixels; ++p, out += pixel) {
        const A* from = cells_ + p * kPanel - lane;
        for (int l = first; l < last; ++l) narrow(from[l], out[panel.dest_channel + l]);
      }
    }

    const ImageConv& conv_;
    ThreadScratch& scratch_;
    A* cells_;  // a tile's results before they are masked or narrowed, then one panel's init
    Panel<A> panel_{};
    Index panel_number_ = -1;
    Prefetch<T> next_;
    Index band_n_ = -1, band_q_ = -1, band_rows_ = -1;
  };

  Index band_cols() const { return (cols_ - 1) * plan_.step_w + plan_.dx_max - plan_.dx_min + 1; }

  Index rows_of(const Phase& phase) const { return flat_ ? rows_ : phase.rows; }
  Index cols_of_row(const Phase& phase, Index row) const {
    if (!flat_) return phase.cols;
    return row == rows_ - 1 ? flat_last_cols_ : cols_;
  }

  Index row_tiles() const { return ceil_div(cols_, kTilePixels); }

  // True where no tile reads outside of the image and nothing has to be converted.
  bool reads_in_place() {
    rows_ = plan_.rows;
    cols_ = plan_.cols;
    return std::is_same_v<T, A> && Tile::kReadsInPlace && plan_.dy_min >= 0 && plan_.dx_min >= 0 &&
           (rows_ - 1) * plan_.step_h + plan_.dy_max < source_.rows &&
           (cols_ - 1) * plan_.step_w + plan_.dx_max < source_.cols;
  }

  Band<A> band_in_place(Index n, Index q) const {
    if constexpr (std::is_same_v<T, A>) {
      const Index row = q * plan_.step_h + plan_.dy_min;
      return {source_.data + n * source_.n_stride + row * source_.row_stride +
                  plan_.dx_min * source_.col_stride,
              source_.row_stride, source_.col_stride};
    } else {
      (void)n, (void)q;
      return {};
    }
  }

  // Pointwise, stride 1, and all pixels of source and destination evenly spaced. The gradient of
  // one row or column has a single phase whatever the stride, which then is that of the
  // destination.
  bool one_row_of_pixels() const {
    return plan_.offsets.size() == 1 && plan_.phases.size() == 1 && plan_.dy_min == 0 &&
           plan_.dx_min == 0 && plan_.step_h == 1 && plan_.step_w == 1 && plan_.dest_step_h == 1 &&
           plan_.dest_step_w == 1 && source_.rows == rows_ && source_.cols == cols_ &&
           evenly_spaced(source_) && evenly_spaced(dest_);
  }
  template <typename U>
  static bool evenly_spaced(const Image<U>& image) {
    return (image.rows == 1 || image.row_stride == image.cols * image.col_stride) &&
           (image.n == 1 || image.n_stride == image.rows * image.cols * image.col_stride);
  }

  // Images of 7 or 8 pixels a row would leave the tile half empty: cut the pixels of all images
  // into rows of whole tiles instead.
  void flatten() {
    const Index pixels = dest_.n * rows_ * cols_;
    if (pixels == 0) return;
    flat_ = true;
    cols_ = smaller(pixels, 4 * kTilePixels);
    rows_ = ceil_div(pixels, cols_);
    flat_last_cols_ = pixels - (rows_ - 1) * cols_;
    source_.n = dest_.n = 1;
    source_.rows = dest_.rows = rows_;
    source_.cols = dest_.cols = cols_;
    source_.row_stride = cols_ * source_.col_stride;
    dest_.row_stride = cols_ * dest_.col_stride;
  }

  // Splitting rows keeps the input apart, splitting panels the weights: the larger of the two
  // should be read once. Weights that every thread can keep in its own cache are no reason to copy
  // the whole band in every thread, unless the rows are few and odd. Gathered panels are made by
  // one thread each, where they suffice.
  bool splits_by_panel(int threads) const {
    const Index count = panels_.count(), rows = dest_.n * rows_;
    if (threads == 1 || count < threads || !splits_evenly(count, threads)) return false;
    if (Panels::gathers) return true;
    return source_.n < threads && panels_.weights_outweigh(source_.rows * source_.cols) &&
           (panels_.weight_bytes() > kWeightBytes || !splits_evenly(rows, threads));
  }
  static bool splits_evenly(Index count, int threads) {
    return count % threads == 0 || count >= 4 * threads;
  }

  Image<const T> source_;
  Image<T> dest_;
  const Plan& plan_;
  Panels& panels_;
  Index rows_ = 0, cols_ = 0;  // of the cells
  bool flat_ = false;
  Index flat_last_cols_ = 0;
  bool in_place_;
  Index band_cells_ = 1;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
