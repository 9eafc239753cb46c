#pragma once
// Where the weight panels of ImageConv come from: the packed copy as it lies, rows of it, or the
// full weight, gathered one panel at a time.

#include "cpu/image_conv.h"
#include "cpu/packed_layout.h"
#include "pyeff/nested_conv2d.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// [O, I / groups, kh, kw] with any strides.
template <typename T>
struct Weight {
  const T* data;
  Index out, in, kernel_h, kernel_w;
  Index out_stride, in_stride, h_stride, w_stride;

  Index taps() const { return kernel_h * kernel_w; }
};
template <typename T>
Weight<T> weight_of(const TensorView& t) {
  return {static_cast<const T*>(t.data),
          t.shape[0],
          t.shape[1],
          t.shape[2],
          t.shape[3],
          t.stride[0],
          t.stride[1],
          t.stride[2],
          t.stride[3]};
}

// The selected channels of one side, group by group: channels [lo, lo + count) of each group in
// [first_group, first_group + groups), counted within the group, or the channels of an index.
struct GroupedSelection {
  Index per_group;  // channels of a full group
  Index first_group, groups;
  Index lo, count;
  const Index* index;

  Index channel(Index i) const { return index != nullptr ? index[i] : lo + i; }
};
inline GroupedSelection grouped(const ChannelSelection& s, Index per_group, Index groups) {
  if (groups == 1) return {per_group, 0, 1, s.lo, s.count, s.index};
  if (per_group == 0) return {0, 0, 0, 0, 0, nullptr};
  return {per_group, s.lo / per_group, s.count / per_group, 0, per_group, nullptr};
}

// to[tap][row][lane] = weight at lane_offset[lane] + row_offset(row), zero for missing lanes. Taps
// are the outer loop, since panels of different taps often fall into the same sets of the cache.
template <typename T, typename A, typename RowOffset>
void gather_panel(const Weight<T>& weight, const Index* lane_offset, int lanes, Index rows,
                  const RowOffset& row_offset, A* to) {
  constexpr Index kBlock = 16;  // rows whose lines stay in the first-level cache
  Index offsets[kBlock];
  for (Index block = 0; block < rows; block += kBlock) {
    const Index count = smaller(kBlock, rows - block);
    for (Index r = 0; r < count; ++r) offsets[r] = row_offset(block + r);
    for (Index t = 0; t < weight.taps(); ++t) {
      const T* tap = weight.data + t / weight.kernel_w * weight.h_stride +
                     t % weight.kernel_w * weight.w_stride;
      A* out = to + (t * rows + block) * kPanel;
      for (int lane = 0; lane < lanes; ++lane) {
        const T* from = tap + lane_offset[lane];
        for (Index r = 0; r < count; ++r) out[r * kPanel + lane] = widen(from[offsets[r]]);
      }
      for (Index r = 0; lanes < kPanel && r < count; ++r) {
        for (int lane = lanes; lane < kPanel; ++lane) out[r * kPanel + lane] = A(0);
      }
    }
  }
}

// What all panel sources share. Lanes are the channels of the destination, rows those of the
// source, which are summed.
template <typename T>
class PanelsBase {
 public:
  using A = Accumulator<T>;

  double multiply_adds_per_pixel() const {
    return double(weight_.taps() * rows_.count) * double(lanes_.count * lanes_.groups);
  }
  Index weight_bytes() const {
    return weight_.taps() * rows_.count * lanes_.count * lanes_.groups * Index{sizeof(A)};
  }
  bool weights_outweigh(Index source_pixels) const {
    return weight_.taps() * lanes_.count > source_pixels;
  }

 protected:
  PanelsBase(const Weight<T>& weight, const GroupedSelection& rows, const GroupedSelection& lanes,
             const T* bias)
      : weight_(weight), rows_(rows), lanes_(lanes), bias_(bias) {}

  // `lane` counts within the group, from the first lane of the panel on.
  void fill_init(Index group, Index lane, int first, int last, bool indexed, A* init) const {
    for (int l = 0; l < kPanel; ++l) init[l] = A(0);
    if (bias_ == nullptr) return;
    for (int l = first; l < last; ++l) {
      const Index channel = indexed ? lanes_.channel(lane + l) : lane + l;
      init[l] = widen(bias_[group * lanes_.per_group + channel]);
    }
  }

  Weight<T> weight_;
  GroupedSelection rows_, lanes_;
  const T* bias_;
};

// Panels of the packed copy, whose lanes are aligned to the full layer. With an index of rows the
// selected ones are copied together, otherwise a panel is read where it lies.
template <typename T, bool kIndexedRows>
class PackedPanels : public PanelsBase<T> {
 public:
  using A = Accumulator<T>;
  static constexpr bool gathers = kIndexedRows;

  PackedPanels(const Weight<T>& weight, const A* packed, const GroupedSelection& rows,
               const GroupedSelection& lanes, const T* bias)
      : PanelsBase<T>(weight, rows, lanes, bias),
        packed_(packed),
        first_(lanes.lo / kPanel),
        per_group_(lanes.count == 0 ? 0 : ceil_div(lanes.lo + lanes.count, kPanel) - first_) {}

  Index count() const { return per_group_ * this->lanes_.groups; }

  Panel<A> open(Index j, Scratch& scratch, A* init) const {
    const GroupedSelection &lanes = this->lanes_, &rows = this->rows_;
    const Index group = j / per_group_, p = first_ + j % per_group_;
    const Index full_group = lanes.first_group + group;
    const Index full_panels = ceil_div(lanes.per_group, kPanel);
    const Index full_rows = this->weight_.in, lane = p * kPanel;
    Panel<A> panel{};
    panel.weights =
        packed_ + (full_group * full_panels + p) * this->weight_.taps() * full_rows * kPanel;
    panel.sum = rows.count;
    panel.source_channel = group * rows.count;
    panel.dest_channel = group * lanes.count + lane - lanes.lo;
    panel.first_lane = static_cast<int>(larger(lanes.lo - lane, 0));
    panel.last_lane = static_cast<int>(smaller(lanes.lo + lanes.count - lane, kPanel));
    if constexpr (kIndexedRows) {
      panel.weights = copy_rows(panel.weights, scratch);
      panel.tap_stride = rows.count * kPanel;
    } else {
      panel.weights += rows.lo * kPanel;
      panel.tap_stride = full_rows * kPanel;
    }
    this->fill_init(full_group, lane, panel.first_lane, panel.last_lane, false, init);
    panel.init = init;
    return panel;
  }

 private:
  const A* copy_rows(const A* from, Scratch& scratch) const {
    const GroupedSelection& rows = this->rows_;
    A* to = scratch.get<A>(this->weight_.taps() * rows.count * kPanel);
    A* out = to;
    for (Index t = 0; t < this->weight_.taps(); ++t, from += this->weight_.in * kPanel) {
      for (Index r = 0; r < rows.count; ++r, out += kPanel) {
        std::memcpy(out, from + rows.channel(r) * kPanel, kPanel * sizeof(A));
      }
    }
    return to;
  }

  const A* packed_;
  Index first_, per_group_;
};

// Panels gathered from the full weight. Forward: lanes are output channels, rows input channels;
// for the input gradient the two change places.
template <typename T, bool kLanesAreInputs>
class GatheredPanels : public PanelsBase<T> {
 public:
  using A = Accumulator<T>;
  static constexpr bool gathers = true;

  GatheredPanels(const Weight<T>& weight, const GroupedSelection& rows,
                 const GroupedSelection& lanes, const T* bias)
      : PanelsBase<T>(weight, rows, lanes, bias), per_group_(ceil_div(lanes.count, kPanel)) {}

  Index count() const { return per_group_ * this->lanes_.groups; }

  Panel<A> open(Index j, Scratch& scratch, A* init) const {
    const GroupedSelection &lanes = this->lanes_, &rows = this->rows_;
    const Weight<T>& weight = this->weight_;
    const Index group = j / per_group_, lane = j % per_group_ * kPanel;
    const Index full_group = lanes.first_group + group;
    Panel<A> panel{};
    panel.sum = rows.count;
    panel.tap_stride = rows.count * kPanel;
    panel.source_channel = group * rows.count;
    panel.dest_channel = group * lanes.count + lane;
    panel.first_lane = 0;
    panel.last_lane = static_cast<int>(smaller(lanes.count - lane, kPanel));
    Index lane_offset[kPanel];
    const Index lane_stride = kLanesAreInputs ? weight.in_stride : weight.out_stride;
    const Index row_stride = kLanesAreInputs ? weight.out_stride : weight.in_stride;
    const Index outputs = kLanesAreInputs ? rows.per_group : lanes.per_group;
    const Index base = full_group * outputs * weight.out_stride;
    for (int l = 0; l < panel.last_lane; ++l) {
      lane_offset[l] = base + lanes.channel(lane + l) * lane_stride;
    }
    A* to = scratch.get<A>(weight.taps() * rows.count * kPanel);
    gather_panel(
        weight, lane_offset, panel.last_lane, rows.count,
        [&](Index row) { return rows.channel(row) * row_stride; }, to);
    panel.weights = to;
    this->fill_init(full_group, lane, 0, panel.last_lane, true, init);
    panel.init = init;
    return panel;
  }

 private:
  Index per_group_;
};

// Depth-wise: a panel is kPanel neighbouring channels, [tap][row of the packed copy], or gathered.
template <typename T>
class DepthwisePanels : public PanelsBase<T> {
 public:
  using A = Accumulator<T>;
  static constexpr bool gathers = true;

  DepthwisePanels(const Weight<T>& weight, const A* packed, const ChannelSelection& channels,
                  const T* bias)
      : PanelsBase<T>(weight, {1, 0, 1, 0, 1, nullptr},
                      {weight.out, 0, 1, channels.lo, channels.count, nullptr}, bias),
        packed_(packed) {}

  Index count() const { return ceil_div(this->lanes_.count, kPanel); }

  Panel<A> open(Index j, Scratch& scratch, A* init) const {
    const Weight<T>& weight = this->weight_;
    const Index channel = this->lanes_.lo + j * kPanel;
    Panel<A> panel{};
    panel.sum = 1;
    panel.source_channel = panel.dest_channel = j * kPanel;
    panel.last_lane = static_cast<int>(smaller(this->lanes_.count - j * kPanel, kPanel));
    if (packed_ != nullptr) {
      panel.weights = packed_ + channel;
      panel.tap_stride = depthwise_row(weight.out);
    } else {
      Index lane_offset[kPanel];
      for (int l = 0; l < panel.last_lane; ++l) {
        lane_offset[l] = (channel + l) * weight.out_stride;
      }
      A* to = scratch.get<A>(weight.taps() * kPanel);
      gather_panel(weight, lane_offset, panel.last_lane, 1, [](Index) { return Index{0}; }, to);
      panel.weights = to;
      panel.tap_stride = kPanel;
    }
    this->fill_init(0, j * kPanel, 0, panel.last_lane, true, init);
    panel.init = init;
    return panel;
  }

 private:
  const A* packed_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
