#pragma once
// A convolution of any stride, or the transpose of one, row by row of y: the columns of a row that
// meet the same taps of the kernel are one row of the line tiles, so that no zeros are inserted and
// no map is padded.

#include "cpu/conv_plans.h"
#include "cpu/factorized_conv2d_call.h"
#include "cpu/factorized_conv2d_rows.h"
#include "cpu/sampler_conv2d_pool.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Everything that the threads of a call share.
template <typename T>
struct SamplerCall {
  PairCall<T> maps;  // x, y, residual, and the convolution as its first line
  const Plan* plan;
  PoolEpilogue<Accumulator<T>> pool;

  Index taps() const { return maps.first.layout.taps; }
  bool pools() const { return pool.scale != nullptr; }
  double multiply_adds() const {
    const Image<const T>& x = maps.x;
    const bool transposed = plan->dest_step_h * plan->dest_step_w > 1;
    const double pixels = transposed ? double(x.rows * x.cols) : double(maps.y.rows * maps.y.cols);
    const LineLayout& layout = maps.first.layout;
    return double(maps.y.n) * pixels * double(layout.taps * layout.in * layout.out);
  }
};

// One thread's part of a call. Conv runs a row of a line; the rows that it reads are of Conv::Row.
template <typename T, typename Conv>
class SamplerWorker {
 public:
  using A = Accumulator<T>;
  using R = typename Conv::Row;

  explicit SamplerWorker(const SamplerCall<T>& call)
      : call_(call),
        x_(call.maps.x),
        plan_(*call.plan),
        rows_(call.maps, 1),
        scratch_(factorized_scratch()),
        row_taps_(scratch_.row_taps.get<RowTap<R>>(call.taps())),
        reaches_(scratch_.middle.get<Reach>(call.taps())),
        line_(call.maps.first, scratch_.taps.get<Tap<A>>(call.taps())),
        next_(x_),
        ring_(make_ring()) {}

  // Rows of y, counted over all images.
  void run(Part rows) {
    const Index per_image = call_.maps.y.rows;
    for (Index t = rows.begin; t < rows.end; ++t) {
      const Index n = t / per_image, h = t % per_image;
      const RowOut<R> out = rows_.open(n, h, 0);
      prefetch_next(t + 1, rows.end);
      for_phases(h, [&](const Phase& phase) { run_phase(phase, n, h, out); });
      if (call_.pools()) pool(n, h, out);
      rows_.close(n, h, out);
    }
  }

 private:
  // A tap, and the cells of a phase's row where it meets pixels of x.
  struct Reach {
    const R* row;
    Index dx, number, begin, end;
  };

  template <typename F>
  void for_phases(Index h, const F& f) const {
    for (const Phase& phase : plan_.phases) {
      if (phase.first_row == h % plan_.dest_step_h) f(phase);
    }
  }

  void run_phase(const Phase& phase, Index n, Index h, const RowOut<R>& out) {
    const Index count = list_reaches(phase, n, h), step = plan_.step_w;
    for (Index c = 0; c < phase.cols;) {
      Index end = phase.cols, met = 0;
      for (Index i = 0; i < count; ++i) {
        const Reach& tap = reaches_[i];
        if (c >= tap.end) continue;
        if (c < tap.begin) {
          end = smaller(end, tap.begin);
          continue;
        }
        end = smaller(end, tap.end);
        row_taps_[met++] = {tap.row + (c * step + tap.dx) * source_pixel_, tap.number};
      }
      line_.run(row_taps_, met, step * source_pixel_, end - c,
                cells(out, phase.first_col + c * plan_.dest_step_w), [&] { next_.step(); });
      c = end;
    }
  }

  Index list_reaches(const Phase& phase, Index n, Index h) {
    const Index step = plan_.step_w;
    Index count = 0;
    for (Index o = phase.offsets_begin; o < phase.offsets_end; ++o) {
      const Offset& offset = plan_.offsets[static_cast<std::size_t>(o)];
      const Index r = source_of(h, offset), last = x_.cols - 1 - offset.dx;
      if (r < 0 || r >= x_.rows || last < 0) continue;
      const Index begin = offset.dx < 0 ? ceil_div(-offset.dx, step) : 0;
      reaches_[count++] = {source_row(n, r), offset.dx, offset.weight_tap, begin, last / step + 1};
    }
    return count;
  }

  // The row of x that a tap reads for row h of y.
  Index source_of(Index h, const Offset& offset) const {
    return h / plan_.dest_step_h * plan_.step_h + offset.dy;
  }

  // Of a row of y, every dest_step_w-th pixel from column `col` on.
  RowOut<R> cells(const RowOut<R>& out, Index col) const {
    const Index step = plan_.dest_step_w;
    const R* residual = out.residual == nullptr ? nullptr : out.residual + col * out.residual_pixel;
    return {out.data + col * out.pixel, step * out.pixel, residual, step * out.residual_pixel};
  }

  void pool(Index n, Index h, const RowOut<R>& out) {
    const R* upper = source_row(n, 2 * h);
    const R* lower = source_row(n, smaller(2 * h + 1, x_.rows - 1));
    R* to = out.data + call_.maps.first.layout.out;
    const PooledRows<R> rows{upper, lower, source_pixel_, x_.cols, x_.channels};
    if constexpr (std::is_same_v<R, A>) {
      if (x_.channels < kLanes<A> && source_pixel_ == x_.channels &&
          clamps(call_.pool.activation)) {
        A* memory = scratch_.transformed.get<A>(x_.cols * x_.channels);
        return pool_few<A>(rows, call_.pool, memory, to, out.pixel);
      }
    }
    pool_row<R, A>(rows, call_.pool, to, out.pixel);
  }

  // The rows of x that the next row of y reads and none before it did.
  void prefetch_next(Index t, Index end) {
    next_.clear();
    if (t == end) return;
    const Index per_image = call_.maps.y.rows, n = t / per_image, h = t % per_image;
    const Index known = h == 0 ? -1 : latest_row(h - 1);
    for (Index r = known + 1; r <= latest_row(h); ++r) next_.add(n, r);
    Index tiles = 0;
    for_phases((t - 1) % per_image, [&](const Phase& p) { tiles += line_.tiles(p.cols); });
    next_.spread(tiles);
  }
  Index latest_row(Index h) const {
    Index latest = -1;
    for_phases(h, [&](const Phase& phase) {
      for (Index o = phase.offsets_begin; o < phase.offsets_end; ++o) {
        latest = larger(latest, source_of(h, plan_.offsets[static_cast<std::size_t>(o)]));
      }
    });
    return smaller(latest, x_.rows - 1);
  }

  const R* source_row(Index n, Index r) {
    if constexpr (std::is_same_v<T, R>) {
      if (in_place_) return x_.data + n * x_.n_stride + r * x_.row_stride;
    }
    return ring_.get(n, r, [&](Index row, R* to) {
      copy_band<T, R>(x_, n, row, 1, 0, x_.cols, 0, x_.channels, source_pixel_, to);
    });
  }

  // The ring holds the rows of x that were copied.
  RowRing<R> make_ring() {
    const Index channels = Conv::readable_channels(x_.channels);
    in_place_ = std::is_same_v<T, R> && channels == x_.channels;
    source_pixel_ = in_place_ ? x_.col_stride : channels;
    const Index slots = larger(plan_.dy_max - plan_.dy_min + 1, 2), row = x_.cols * channels;
    if (in_place_) return RowRing<R>(nullptr, slots, row, 1);
    R* data = scratch_.source.get<R>(slots * row);
    // Channels that are read and do not exist are zero.
    if (channels != x_.channels) {
      std::memset(data, 0, static_cast<std::size_t>(slots * row) * sizeof(R));
    }
    return RowRing<R>(data, slots, row, 1);
  }

  const SamplerCall<T>& call_;
  const Image<const T>& x_;
  const Plan& plan_;
  PairRows<T, R> rows_;
  FactorizedScratch& scratch_;
  RowTap<R>* row_taps_;
  Reach* reaches_;
  Conv line_;
  RowPrefetch<T> next_;
  bool in_place_ = false;
  Index source_pixel_ = 0;
  RowRing<R> ring_;  // last: making it sets what is above
};

template <typename Conv, typename T>
void run_sampler(const SamplerCall<T>& call, int threads) {
  const Index rows = call.maps.y.n * call.maps.y.rows;
  if (rows == 0 || call.maps.y.cols == 0 || call.maps.y.channels == 0) return;
  threads = useful_threads(threads, call.multiply_adds());
  parallel(threads, [&](int thread, int of) {
    SamplerWorker<T, Conv>(call).run(part_of(rows, thread, of));
  });
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
