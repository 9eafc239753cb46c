#pragma once
// The (image, branch) pairs of a call: where their maps are, and the order in which they are run.

#include <vector>

#include "cpu/image.h"
#include "cpu/scratch.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

// One map for each pair, or one for each image that its k pairs share. Pair n * k + j is the j-th
// of image n.
template <typename T>
struct PairMaps {
  Image<T> map;  // of the first image
  Index k;
  Index pair_stride;
  bool shared;
  Index first_image = 0;

  Index offset(Index pair) const {
    const Index n = pair / k;
    return (n - first_image) * map.n_stride + (pair - n * k) * pair_stride;
  }
};

// [N, C, H, W] or [N, k, C, H, W]
template <typename T>
PairMaps<T> maps_of(const TensorView& t, Index k) {
  if (t.ndim == 4) return {image_of<T>(t), k, 0, true};
  return {{static_cast<T*>(t.data), t.shape[0], t.shape[3], t.shape[4], t.shape[2], t.stride[0],
           t.stride[3], t.stride[4]},
          k,
          t.stride[1],
          false};
}

// One pair. Where k pairs share a destination, only the first that is run may overwrite it.
struct Visit {
  Index pair;
  std::int32_t branch;
  bool first;
};

// The index [N, k] of a call.
struct Routes {
  const std::int32_t* index;
  Index n, k, branches;

  Index pairs() const { return n * k; }
};
inline Routes routes_of(const TensorView& index, Index branches) {
  return {index.as<const std::int32_t>(), index.shape[0], index.shape[1], branches};
}

// Visits of some pairs; thread-local objects keep their memory from call to call.
class VisitList {
 public:
  void in_order(const Routes& routes, Part pairs) {
    visits_.clear();
    for (Index p = pairs.begin; p < pairs.end; ++p) visits_.push_back({p, routes.index[p], true});
  }

  // By branch, then by pair: a counting sort.
  void by_branch(const Routes& routes, Part pairs) {
    starts_.assign(static_cast<std::size_t>(routes.branches + 1), 0);
    for (Index p = pairs.begin; p < pairs.end; ++p) ++starts_[routes.index[p] + 1];
    for (Index b = 0; b < routes.branches; ++b) starts_[b + 1] += starts_[b];
    visits_.resize(static_cast<std::size_t>(pairs.end - pairs.begin));
    next_.assign(starts_.begin(), starts_.end());
    for (Index p = pairs.begin; p < pairs.end; ++p) {
      const std::int32_t branch = routes.index[p];
      visits_[next_[branch]++] = {p, branch, true};
    }
  }

  // After by_branch on whole images: only the first visit of an image keeps its mark.
  void mark_first_of_images(const Routes& routes, Part images) {
    seen_.assign(static_cast<std::size_t>(images.end - images.begin), 0);
    for (Visit& visit : visits_) {
      char& seen = seen_[visit.pair / routes.k - images.begin];
      visit.first = seen == 0;
      seen = 1;
    }
  }

  // Where the destinations hold something that is to be kept.
  void mark_none_first() {
    for (Visit& visit : visits_) visit.first = false;
  }

  const Visit* data() const { return visits_.data(); }
  Index size() const { return static_cast<Index>(visits_.size()); }
  // The visits of a branch, after by_branch.
  Part of_branch(Index branch) const { return {starts_[branch], starts_[branch + 1]}; }

 private:
  std::vector<Visit> visits_;
  std::vector<Index> starts_, next_;
  std::vector<char> seen_;
};

inline VisitList& thread_visits() {
  static thread_local VisitList visits;
  return visits;
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
