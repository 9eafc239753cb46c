#pragma once
// Rows that are made when they are needed and kept while the kernel may need them again, and the
// order of output rows in which that is not long.

#include <vector>

#include "cpu/image.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// Output rows that share input rows lie d / gcd(s, d) apart, for stride s and dilation d: such a
// chain of rows is run through before the next one.
class ChainOrder {
 public:
  ChainOrder(Index rows, Index stride, Index dilation) : rows_(rows) {
    Index a = stride, b = dilation;
    while (b != 0) {
      const Index rest = a % b;
      a = b;
      b = rest;
    }
    step_ = smaller(dilation / a, larger(rows, 1));
  }

  // The output row at `position` of the order.
  Index row(Index position) const {
    const Index whole = rows_ / step_, longer = rows_ % step_;  // chains of whole + 1 rows
    const Index chain = smaller(position / (whole + 1), longer);
    const Index rest = position - chain * (whole + 1);
    if (chain < longer) return chain + rest * step_;
    return chain + rest / whole + rest % whole * step_;
  }

  Index step() const { return step_; }

 private:
  Index rows_, step_;
};

// The last rows of a chain, as many as the kernel has taps.
template <typename A>
class RowRing {
 public:
  // data has slots * row_elements elements, which are not touched here.
  RowRing(A* data, Index slots, Index row_elements, Index dilation)
      : data_(data),
        row_elements_(row_elements),
        dilation_(dilation),
        keys_(static_cast<std::size_t>(slots), Key{-1, -1}) {}

  // Row r of image n; make(r, row) writes it if it is not there.
  template <typename Make>
  A* get(Index n, Index r, const Make& make) {
    // Rows that one output row needs are `dilation` apart: they fall into different slots.
    const std::size_t slot = static_cast<std::size_t>(r / dilation_) % keys_.size();
    A* row = data_ + static_cast<Index>(slot) * row_elements_;
    Key& key = keys_[slot];
    if (key.n != n || key.row != r) {
      make(r, row);
      key = {n, r};
    }
    return row;
  }

 private:
  struct Key {
    Index n, row;
  };

  A* data_;
  Index row_elements_, dilation_;
  std::vector<Key> keys_;
};

// Fetches rows of an image that will be read next, a few lines at a time between the tiles of the
// present work: read all at once, they would come at the latency of the memory.
template <typename T>
class RowPrefetch {
 public:
  explicit RowPrefetch(const Image<const T>& image) : image_(image) {
    const Index gap = image.col_stride - image.channels;
    constexpr Index kLine = 64;
    const Index span = image.cols * image.col_stride * Index{sizeof(T)};
    lines_ = gap > image.channels ? 0 : ceil_div(span, kLine);  // mostly gaps: not worth it
  }

  void clear() {
    rows_.clear();
    at_ = 0;
  }
  void add(Index n, Index r) {
    const T* row = image_.data + n * image_.n_stride + r * image_.row_stride;
    rows_.push_back(reinterpret_cast<const char*>(row));
  }
  // Spreads what was added over so many calls of step().
  void spread(Index steps) {
    per_step_ = ceil_div(static_cast<Index>(rows_.size()) * lines_, larger(steps, 1));
  }
  void step() {
    const Index end = smaller(at_ + per_step_, static_cast<Index>(rows_.size()) * lines_);
    for (; at_ < end; ++at_) prefetch(rows_[at_ / lines_] + at_ % lines_ * 64);
  }

 private:
  Image<const T> image_;
  Index lines_, at_ = 0, per_step_ = 0;
  std::vector<const char*> rows_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
