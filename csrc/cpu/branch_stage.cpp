// branch_stage: one thread runs a whole branch for one (image, branch) pair, step after step, on
// maps in its own scratch.
//   y[n, j] = steps of branch index[n, j] on x[n] or x[n, j]
// Every output element is summed by one thread in a fixed order, whatever the number of threads.

#include <atomic>

#include "cpu/branch_stage_kernels.h"
#include "cpu/branch_stage_point.h"
#include "cpu/image.h"
#include "cpu/nested_conv2d_types.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// T is the type of x and y.
template <typename T>
class StageWorker {
 public:
  using A = Accumulator<T>;

  explicit StageWorker(const StageRun& run)
      : run_(run),
        scratch_(thread_scratch().band.get<A>(run.scratch)),
        taps_(thread_scratch().taps.get<Tap<A>>(larger(run.taps, 1))) {}

  void run_pair(Index pair) {
    read_input(pair);
    pair_ = pair;
    const A* parameters =
        run_.packed.as<const A>() + Index{run_.index[pair]} * run_.branch_elements;
    for (Index s = 0; s < run_.step_count; ++s) run_step(s, parameters);
    if (run_.maps[run_.output].place != StageMap::kOutput) write_output();
  }

 private:
  const T* input() const {
    const TensorView& x = run_.x;
    const Index n = pair_ / run_.k;
    return x.as<const T>() +
           (run_.x_per_pair ? n * x.stride[0] + pair_ % run_.k * x.stride[1] : n * x.stride[0]);
  }
  Index output_elements() const {
    const StageMap& map = run_.maps[run_.output];
    return map.rows * map.cols * map.channels;
  }

  SlotMap<A> map_of(int slot) const {
    const StageMap& map = run_.maps[slot];
    A* data = scratch_ + map.offset + map.top * map.row + map.left * map.pixel;
    if constexpr (std::is_same_v<T, A>) {
      if (map.place == StageMap::kInput) data = const_cast<A*>(input());
      if (map.place == StageMap::kOutput) data = run_.y.as<A>() + pair_ * output_elements();
    }
    return {data, map.channels, map.rows, map.cols, map.pixel, map.row};
  }
  SlotMap<const A> source(int slot) const {
    const SlotMap<A> map = map_of(slot);
    return {map.data, map.channels, map.rows, map.cols, map.pixel, map.row};
  }

  // Zeros around the map, which convolutions read.
  void surround(int slot) const {
    const StageMap& map = run_.maps[slot];
    if (map.place != StageMap::kScratch) return;
    // Pixels are whole vectors, and too few for memset to be worth its call.
    const auto clear = [](A* from, Index count) {
      for (Index l = 0; l < count; l += kLanes<A>) store(from + l, Vec<A>{});
    };
    A* row = scratch_ + map.offset;
    clear(row, map.top * map.row);
    row += map.top * map.row;
    if (map.left + map.right > 0) {
      for (Index r = 0; r < map.rows; ++r, row += map.row) {
        clear(row, map.left * map.pixel);
        clear(row + (map.left + map.cols) * map.pixel, map.right * map.pixel);
      }
    } else {
      row += map.rows * map.row;
    }
    clear(row, map.bottom * map.row);
  }

  // The branches of an image share its copy.
  void read_input(Index pair) {
    const bool same =
        pair_ >= 0 && (run_.x_per_pair ? pair == pair_ : pair / run_.k == pair_ / run_.k);
    pair_ = pair;
    if (same || run_.maps[0].place != StageMap::kScratch) return;
    surround(0);
    const SlotMap<A> to = map_of(0);
    const int last = run_.x.ndim - 1;
    const Index row = to.rows == 1 ? 0 : run_.x.stride[last - 1];
    const Index pixel = to.cols == 1 ? 0 : run_.x.stride[last];
    const T* from = input();
    for (Index r = 0; r < to.rows; ++r) {
      if (pixel == to.channels && to.pixel == to.channels) {
        widen_row(from + r * row, to.at(r, 0), to.cols * to.channels);
        continue;
      }
      for (Index c = 0; c < to.cols; ++c) {
        widen_row(from + r * row + c * pixel, to.at(r, c), to.channels);
      }
    }
  }

  void write_output() const {
    const SlotMap<const A> from = source(run_.output);
    T* to = run_.y.as<T>() + pair_ * output_elements();
    for (Index r = 0; r < from.rows; ++r) {
      for (Index c = 0; c < from.cols; ++c, to += from.channels) {
        const A* pixel = from.at(r, c);
        for (Index l = 0; l < from.channels; ++l) narrow(pixel[l], to[l]);
      }
    }
  }

  void run_step(Index s, const A* parameters) const {
    const StageStep& step = run_.steps[s];
    const int* sources = run_.sources + step.first_source;
    const int slot = static_cast<int>(s) + 1;
    const SlotMap<const A> x = source(sources[0]);
    const SlotMap<A> y = map_of(slot);
    const A* first = parameters + run_.parameters[s].weights;
    const A* second = parameters + run_.parameters[s].biases;
    surround(slot);
    switch (step.kind) {
      case StageKind::kConv2d:
      case StageKind::kLinear:
        convolve(step, StageConv<A>(step, first, second, taps_), x, y);
        return;
      case StageKind::kScaleShift:
        return scale_shift(x, first, second, y, step.activation);
      case StageKind::kActivation:
        return activate(x, y, step.activation);
      case StageKind::kAdd:
        return add(x, source(sources[1]), y, step.activation);
      case StageKind::kPool2d:
      case StageKind::kAdaptivePool2d:
        return pool(step, x, y);
      case StageKind::kFlatten:
        flatten(x, y.data);
        return activate_in_place(slot, step.activation);
      case StageKind::kConcat:
        for (Index i = 0, channel = 0; i < step.source_count; ++i) {
          const SlotMap<const A> part = source(sources[i]);
          copy_channels(part, y, channel);
          channel += part.channels;
        }
        return activate_in_place(slot, step.activation);
    }
  }

  void convolve(const StageStep& step, const StageConv<A>& conv, const SlotMap<const A>& x,
                const SlotMap<A>& y) const {
    if (step.residual >= 0) {
      const SlotMap<const A> residual = source(step.residual);
      conv.run(x, y, &residual);
    } else {
      conv.run(x, y, nullptr);
    }
    if (!clamps(step.activation)) activate_in_place(y, step.activation);
  }

  void activate_in_place(int slot, Activation activation) const {
    activate_in_place(map_of(slot), activation);
  }
  void activate_in_place(const SlotMap<A>& y, Activation activation) const {
    if (activation == Activation::kNone) return;
    activate<A>({y.data, y.channels, y.rows, y.cols, y.pixel, y.row}, y, activation);
  }

  const StageRun& run_;
  A* scratch_;
  Tap<A>* taps_;
  Index pair_ = -1;
};

template <typename T>
void forward(const StageRun& run) {
  std::atomic<Index> next{0};
  parallel(run.threads, [&](int, int) {
    StageWorker<T> worker(run);
    for (Index begin; (begin = next.fetch_add(run.chunk)) < run.pairs;) {
      const Index end = smaller(begin + run.chunk, run.pairs);
      for (Index i = begin; i < end; ++i) {
        worker.run_pair(run.order == nullptr ? i : run.order[i]);
      }
    }
  });
}

// --- packing -------------------------------------------------------------------------------------

// [B, O, rows, kh, kw] of which the last dimensions may be missing.
template <typename T>
class Stacked {
 public:
  Stacked(const TensorView& t, Index branch, Index kernel_w)
      : data_(t.as<const T>() + branch * t.stride[0]),
        out_(t.stride[1]),
        row_(t.ndim > 2 ? t.stride[2] : 0),
        tap_h_(t.ndim > 3 ? t.stride[3] : 0),
        tap_w_(t.ndim > 3 ? t.stride[4] : 0),
        kernel_w_(kernel_w) {}

  Accumulator<T> at(Index out, Index row, Index tap) const {
    return widen(
        data_[out * out_ + row * row_ + tap / kernel_w_ * tap_h_ + tap % kernel_w_ * tap_w_]);
  }

 private:
  const T* data_;
  Index out_, row_, tap_h_, tap_w_, kernel_w_;
};

template <typename T, typename A>
void pack_vector(const TensorView* t, Index branch, Index first, Index count, Index lanes, A* to) {
  for (Index l = 0; l < lanes; ++l) {
    to[l] = t != nullptr && l < count ? Stacked<T>(*t, branch, 1).at(first + l, 0, 0) : A(0);
  }
}

template <typename T, typename A>
void pack_group(const StageStep& step, const Stacked<T>& weight, Index group, A* to) {
  const Index channels = step.out / step.groups, lanes = group_lanes(step);
  const Index first = group * channels;
  for (Index lane = 0; lane < lanes; lane += kPanel) {
    const Index width = smaller(kPanel, lanes - lane);
    for (Index tap = 0; tap < taps_of(step); ++tap) {
      for (Index row = 0; row < step.rows_in; ++row, to += width) {
        for (Index l = 0; l < width; ++l) {
          to[l] = lane + l < channels ? weight.at(first + lane + l, row, tap) : A(0);
        }
      }
    }
  }
}

template <typename T, typename A>
void pack_step(const StageStep& step, const TensorView& first, const TensorView* second,
               Index branch, A* weights, A* biases) {
  if (step.kind == StageKind::kScaleShift) {
    pack_vector<T>(&first, branch, 0, step.out, padded_lanes(step.out), weights);
    pack_vector<T>(second, branch, 0, step.out, padded_lanes(step.out), biases);
    return;
  }
  const Stacked<T> weight(first, branch, step.kernel_w);
  if (is_depthwise(step)) {
    const Index lanes = padded_lanes(step.out);
    for (Index tap = 0; tap < taps_of(step); ++tap) {
      for (Index l = 0; l < lanes; ++l) {
        weights[tap * lanes + l] = l < step.out ? weight.at(l, 0, tap) : A(0);
      }
    }
    pack_vector<T>(second, branch, 0, step.out, lanes, biases);
    return;
  }
  const Index channels = step.out / step.groups, lanes = group_lanes(step);
  for (Index g = 0; g < step.groups; ++g) {
    pack_group<T>(step, weight, g, weights + g * group_weights(step));
    pack_vector<T>(second, branch, g * channels, channels, lanes, biases + g * lanes);
  }
}

template <typename T>
void pack(const StagePacking& packing) {
  using A = Accumulator<T>;
  parallel(packing.threads, [&](int thread, int of) {
    const Part part = part_of(packing.branches, thread, of);
    for (Index branch = part.begin; branch < part.end; ++branch) {
      A* to = packing.packed.as<A>() + branch * packing.branch_elements;
      for (Index s = 0; s < packing.step_count; ++s) {
        const StageStep& step = packing.steps[s];
        if (step.tensors[0] < 0) continue;
        const TensorView* second =
            step.tensors[1] < 0 ? nullptr : &packing.tensors[step.tensors[1]];
        pack_step<T>(step, packing.tensors[step.tensors[0]], second, branch,
                     to + packing.parameters[s].weights, to + packing.parameters[s].biases);
      }
    }
  });
}

void branch_stage_pack(const StagePacking& packing) {
  const Dtype dtype = packing.tensors[0].dtype;
  for_dtype(dtype, [&](auto t) { pack<decltype(t)>(packing); });
}

void branch_stage_forward(const StageRun& run) {
  for_dtype(run.x.dtype, [&](auto t) { forward<decltype(t)>(run); });
}

}  // namespace

extern const BranchStageKernels branch_stage_kernels{&branch_stage_pack, &branch_stage_forward};

}  // namespace pyeff::cpu::PYEFF_ISA
