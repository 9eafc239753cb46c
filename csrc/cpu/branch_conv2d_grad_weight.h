#pragma once
// Gradient of the weights of all branches, [B, O, C / groups, kh, kw]:
//   gW[b, o, i, u, v] = sum gy[n, j, o, h, w] x[n, (j,) i, h s + u d - p, w s + v d - p]
// over the pixels of the pairs (n, j) of branch b. Lanes are input channels, the tile's pixels are
// output channels, and what is summed are the pixels of gy. A unit of work is a block of output
// channels times a panel of input channels of one branch; its sums belong to one thread, which adds
// the pairs in their order whatever the number of threads.

#include "cpu/branch_conv2d_layout.h"
#include "cpu/branch_conv2d_pairs.h"
#include "cpu/tile.h"
#include "pyeff/conv_window.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Units [begin, end) of each branch's `per_branch`, by thread: a branch costs its number of visits
// for each unit, and one more for writing.
class UnitSplit {
 public:
  UnitSplit(const VisitList& visits, Index branches, Index per_branch, int thread, int of)
      : visits_(visits), per_branch_(per_branch) {
    Index total = 0;
    for (Index b = 0; b < branches; ++b) total += per_branch * cost(b);
    mine_ = part_of(total, thread, of);
  }

  // The units of `branch` that start in this thread's part; to be asked branch by branch.
  Part next(Index branch) {
    const Index unit = cost(branch), start = passed_;
    passed_ += unit * per_branch_;
    const auto first_from = [&](Index at) {
      return larger(smaller(ceil_div(larger(at - start, 0), unit), per_branch_), 0);
    };
    return {first_from(mine_.begin), first_from(mine_.end)};
  }

 private:
  Index cost(Index branch) const {
    const Part part = visits_.of_branch(branch);
    return part.end - part.begin + 1;
  }

  const VisitList& visits_;
  Index per_branch_, passed_ = 0;
  Part mine_{};
};

// Where the sums and the operands of the tile are, in one thread.
struct GradWeightScratch {
  Scratch x, grad_y, sums, rows;
};
inline GradWeightScratch& grad_weight_scratch() {
  static thread_local GradWeightScratch scratch;
  return scratch;
}

// `scale`, by pair, may be null; it multiplies grad_y. `to` is contiguous.
template <typename T>
class BranchGradWeight {
 public:
  using A = Accumulator<T>;

  BranchGradWeight(const PairMaps<const T>& grad_y, const PairMaps<const T>& x, const T* scale,
                   const TensorView& shape, Index groups, const ConvWindow& window, T* to)
      : grad_y_(grad_y),
        x_(x),
        scale_(scale),
        window_(window),
        to_(to),
        branches_(shape.shape[0]),
        groups_(groups),
        out_(shape.shape[1] / groups),
        in_(shape.shape[2]),
        kernel_h_(shape.shape[3]),
        kernel_w_(shape.shape[4]) {
    width_ = in_ <= kPanel / 2 ? kPanel / 2 : kPanel;
    panels_ = ceil_div(in_, width_);
    blocks_ = ceil_div(out_, kTilePixels);
    band_rows_ = (grad_y.map.rows - 1) * window.stride_h + (kernel_h_ - 1) * window.dilation_h + 1;
    band_cols_ = (grad_y.map.cols - 1) * window.stride_w + (kernel_w_ - 1) * window.dilation_w + 1;
    const bool inside = window.pad_top == 0 && window.pad_left == 0 && band_rows_ <= x.map.rows &&
                        band_cols_ <= x.map.cols;
    constexpr Index kFewPixels = 8;  // each row of gy costs a few cycles of its own
    const bool few = grad_y.map.rows * grad_y.map.cols < kFewPixels;
    x_in_place_ = std::is_same_v<T, A> && inside && !few && in_ % kLanes<A> == 0 &&
                  spaced(x.map.col_stride) == x.map.col_stride;
    grad_y_in_place_ = std::is_same_v<T, A> && scale == nullptr && !few &&
                       spaced(grad_y.map.col_stride) == grad_y.map.col_stride;
    const Index sum_bytes = out_ * taps() * width_ * Index{sizeof(A)};
    pass_ = larger(kSumBytes / larger(sum_bytes, 1), 1);
  }

  void run(const Routes& routes, int threads) const {
    VisitList& visits = thread_visits();
    visits.by_branch(routes, {0, routes.pairs()});
    const Index per_branch = groups_ * panels_ * blocks_;
    threads = useful_threads(threads, double(routes.pairs()) * double(per_branch * taps()) *
                                          double(grad_y_.map.rows * grad_y_.map.cols) *
                                          double(kTilePixels * width_));
    parallel(threads, [&](int thread, int of) {
      UnitSplit split(visits, branches_, per_branch, thread, of);
      for (Index b = 0; b < branches_; ++b) {
        const Part units = split.next(b), mine = visits.of_branch(b);
        for (Index u = units.begin; u < units.end;) {
          u += run_units(b, u, units.end, visits.data() + mine.begin, mine.end - mine.begin);
        }
      }
    });
  }

 private:
  // The operands of a tile should fit the second-level cache together with its sums.
  static constexpr Index kChunkBytes = 96 * 1024, kSumBytes = 128 * 1024;

  Index taps() const { return kernel_h_ * kernel_w_; }
  Part outputs_of(Index block) const {
    return part_of(out_, static_cast<int>(block), static_cast<int>(blocks_));
  }

  // Tiles read a few numbers of many pixels: these should not fall into few sets of the cache.
  static Index spaced(Index pixel) {
    constexpr Index kBytes = 512;
    return pixel * Index{sizeof(A)} % kBytes == 0 ? pixel + kLanes<A> : pixel;
  }

  // What is loaded of every pair: some input and output channels of one group.
  struct Work {
    Part blocks;
    Index panels;           // whose operands are loaded together
    Index input, inputs;    // from input channel `input` of x on
    Index output, outputs;  // likewise of gy
    Index x_pixel, x_row, x_map;
    Index gy_pixel, gy_row, gy_map;
  };

  Work work_of(Index group, Part panels, Part blocks) const {
    const Part outputs{outputs_of(blocks.begin).begin, outputs_of(blocks.end - 1).end};
    const Index lane = panels.begin * width_;
    Work work{};
    work.blocks = blocks;
    work.panels = panels.end - panels.begin;
    work.input = group * in_ + lane;
    work.inputs = smaller(panels.end * width_, in_) - lane;
    work.output = group * out_ + outputs.begin;
    work.outputs = outputs.end - outputs.begin;
    work.x_pixel =
        x_in_place_ ? x_.map.col_stride : spaced(ceil_div(work.inputs, kLanes<A>) * kLanes<A>);
    work.x_row = x_in_place_ ? x_.map.row_stride : band_cols_ * work.x_pixel;
    work.x_map = band_rows_ * band_cols_ * work.x_pixel;
    work.gy_pixel = grad_y_in_place_ ? grad_y_.map.col_stride : spaced(work.outputs);
    work.gy_row = grad_y_in_place_ ? grad_y_.map.row_stride : grad_y_.map.cols * work.gy_pixel;
    work.gy_map = grad_y_.map.rows * grad_y_.map.cols * work.gy_pixel;
    return work;
  }

  // Runs units of a branch from u on: some blocks of one panel, or several whole panels, whose
  // operands need to be loaded only once. Returns how many.
  Index run_units(Index branch, Index u, Index end, const Visit* visits, Index count) const {
    const Index panel = u / blocks_, group = panel / panels_, in_group = panel - group * panels_;
    const Index block = u - panel * blocks_, whole = (end - u) / blocks_;
    if (block != 0 || whole == 0) {
      const Part blocks{block, smaller(blocks_, block + end - u)};
      run_pass(branch, work_of(group, {in_group, in_group + 1}, blocks), visits, count);
      return blocks.end - blocks.begin;
    }
    const Index panels = smaller(smaller(whole, panels_ - in_group), pass_);
    run_pass(branch, work_of(group, {in_group, in_group + panels}, {0, blocks_}), visits, count);
    return panels * blocks_;
  }

  void run_pass(Index branch, const Work& work, const Visit* visits, Index count) const {
    const Index elements = work.panels * taps() * work.outputs * width_;
    A* sums = grad_weight_scratch().sums.template get<A>(elements);
    std::memset(sums, 0, static_cast<std::size_t>(elements) * sizeof(A));
    const Index map_bytes = larger((work.x_map + work.gy_map) * Index{sizeof(A)}, 1);
    const Index chunk = larger(kChunkBytes / map_bytes, 1);
    for (Index i = 0; i < count; i += chunk) {
      add_chunk(work, visits + i, smaller(chunk, count - i), sums);
    }
    for (Index p = 0; p < work.panels; ++p, sums += taps() * work.outputs * width_) {
      write(branch, work, p, sums);
    }
  }

  // sums[panel][tap][output][lane]
  void add_chunk(const Work& work, const Visit* visits, Index count, A* sums) const {
    Index row_count = 0;
    const Tap<A>* rows = load(work, visits, count, row_count);
    TileCall<A> call{};
    call.taps = rows;
    call.tap_count = row_count;
    call.a_pixel = 1;
    call.a_step = work.gy_pixel;
    call.b_step = window_.stride_w * work.x_pixel;
    call.out_pixel = width_;
    const Index first = outputs_of(work.blocks.begin).begin;
    for (Index p = 0; p < work.panels; ++p) {
      const Index lanes = smaller(width_, work.inputs - p * width_);
      const int vecs = static_cast<int>(ceil_div(lanes, kLanes<A>));
      for (Index t = 0; t < taps(); ++t, sums += work.outputs * width_) {
        const Index tap = t / kernel_w_ * window_.dilation_h * work.x_row +
                          t % kernel_w_ * window_.dilation_w * work.x_pixel + p * width_;
        for (Index block = work.blocks.begin; block < work.blocks.end; ++block) {
          const Part outputs = outputs_of(block);
          call.a_offset = outputs.begin - first;
          for (int v = 0; v < vecs; v += kTileVecs) {
            call.b_offset = tap + v * kLanes<A>;
            call.out = sums + call.a_offset * width_ + v * kLanes<A>;
            run_tile<DenseTile>(static_cast<int>(outputs.end - outputs.begin),
                                static_cast<int>(smaller(kTileVecs, vecs - v)), call);
          }
        }
      }
    }
  }

  // The rows of gy, each with the pixels of x under it at the first position of the kernel.
  const Tap<A>* load(const Work& work, const Visit* visits, Index count, Index& row_count) const {
    GradWeightScratch& scratch = grad_weight_scratch();
    const Index map_rows = grad_y_.map.rows, x_step = window_.stride_w * work.x_pixel;
    A* x_copy = x_in_place_ ? nullptr : scratch.x.get<A>(count * work.x_map + kPanel);
    A* gy_copy = grad_y_in_place_ ? nullptr : scratch.grad_y.get<A>(count * work.gy_map);
    Tap<A>* rows = scratch.rows.get<Tap<A>>(larger(count * map_rows, 1));
    for (Index i = 0; i < count; ++i) {
      const A* x = load_x(work, visits[i].pair, x_copy);
      const A* gy = load_grad_y(work, visits[i].pair, gy_copy);
      for (Index r = 0; r < map_rows; ++r) {
        add_row(rows, row_count, gy + r * work.gy_row, x + r * window_.stride_h * work.x_row,
                work.gy_pixel, x_step);
      }
      if (!x_in_place_) x_copy += work.x_map;
      if (!grad_y_in_place_) gy_copy += work.gy_map;
    }
    return rows;
  }

  const A* load_x(const Work& work, Index pair, A* copy) const {
    Image<const T> map = x_.map;
    map.data += x_.offset(pair);
    if constexpr (std::is_same_v<T, A>) {
      if (x_in_place_) return map.data + work.input;
    }
    copy_band<T, A>(map, 0, -window_.pad_top, band_rows_, -window_.pad_left, band_cols_, work.input,
                    work.inputs, work.x_pixel, copy);
    return copy;
  }

  const A* load_grad_y(const Work& work, Index pair, A* copy) const {
    const T* map = grad_y_.map.data + grad_y_.offset(pair) + work.output;
    if constexpr (std::is_same_v<T, A>) {
      if (grad_y_in_place_) return map;
    }
    const A scale = scale_ == nullptr ? A(1) : widen(scale_[pair]);
    A* to = copy;
    for (Index r = 0; r < grad_y_.map.rows; ++r, map += grad_y_.map.row_stride) {
      for (Index c = 0; c < grad_y_.map.cols; ++c, to += work.gy_pixel) {
        const T* from = map + c * grad_y_.map.col_stride;
        for (Index o = 0; o < work.outputs; ++o) to[o] = scale * widen(from[o]);
      }
    }
    return copy;
  }

  // Rows that follow each other in both operands are one longer sum.
  void add_row(Tap<A>* rows, Index& count, const A* gy, const A* x, Index gy_step,
               Index x_step) const {
    if (count > 0) {
      Tap<A>& before = rows[count - 1];
      if (before.a + before.k * gy_step == gy && before.b + before.k * x_step == x) {
        before.k += grad_y_.map.cols;
        return;
      }
    }
    rows[count++] = {gy, x, grad_y_.map.cols};
  }

  void write(Index branch, const Work& work, Index panel, const A* sums) const {
    const Index lane = panel * width_, lanes = smaller(width_, work.inputs - lane);
    const Index in = work.input % in_ + lane;
    for (Index o = 0; o < work.outputs; ++o) {
      T* to = to_ + ((branch * groups_ * out_ + work.output + o) * in_ + in) * taps();
      for (Index t = 0; t < taps(); ++t) {
        const A* from = sums + (t * work.outputs + o) * width_;
        for (Index i = 0; i < lanes; ++i) narrow(from[i], to[i * taps() + t]);
      }
    }
  }

  PairMaps<const T> grad_y_, x_;
  const T* scale_;
  ConvWindow window_;
  T* to_;
  Index branches_, groups_, out_, in_;  // outputs and inputs of a group
  Index kernel_h_, kernel_w_;
  Index width_, panels_, blocks_, pass_, band_rows_, band_cols_;
  bool x_in_place_, grad_y_in_place_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
