#pragma once
// Which thread runs which pairs, and in which order.
//   Every pair has a destination of its own: all pairs are sorted by branch, so that a branch's
//   weights are packed once and stay in the cache for all of its pairs. Branches that are packed
//   already and together fit the second-level cache are run image by image instead where that
//   saves padding the input k times.
//   The pairs of an image share a destination: a thread owns whole images and runs their pairs by
//   branch, so that the order of every sum is given by the index alone.
// A thread's first and last map may be cut between panels, so that few maps keep all threads busy.

#include "cpu/branch_conv2d_pairs.h"
#include "cpu/branch_conv2d_weights.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

inline Scratch& thread_weights() {
  static thread_local Scratch weights;
  return weights;
}

// Of one thread: runs visits on the packed copy, or packs a branch whenever it changes.
template <typename T, typename Worker>
class BranchRunner {
 public:
  using A = Accumulator<T>;

  BranchRunner(Worker& worker, Index group, const BranchWeights<T>& weights, const A* packed)
      : worker_(worker), group_(group), weights_(weights), packed_(packed) {}

  // `mixed` groups of visits may have several branches, which must be packed.
  void run(const Visit* visits, Index count, Part panels, bool mixed) {
    for (Index i = 0; i < count;) {
      Index end = i + 1;
      while (end < count && end - i < group_ && (mixed || visits[end].branch == visits[i].branch)) {
        ++end;
      }
      run_group(visits + i, end - i, panels);
      i = end;
    }
  }

 private:
  void run_group(const Visit* visits, Index count, Part panels) {
    const Index elements = weights_.layout().elements();
    if (packed_ != nullptr) {
      worker_.run(visits, count, panels, packed_, elements);
      return;
    }
    if (visits[0].branch != branch_) {
      branch_ = visits[0].branch;
      scratch_ = thread_weights().template get<A>(elements);
      weights_.pack(branch_, scratch_);
    }
    worker_.run(visits, count, panels, scratch_, 0);
  }

  Worker& worker_;
  Index group_;
  const BranchWeights<T>& weights_;
  const A* packed_;
  A* scratch_ = nullptr;
  Index branch_ = -1;
};

// Calls f(maps, panels) for the parts of [begin, end), counted in panels of maps.
template <typename F>
void for_maps(Part units, Index panels, const F& f) {
  Index u = units.begin;
  while (u < units.end) {
    const Index map = u / panels, panel = u % panels;
    const Index whole = panel == 0 ? (units.end - u) / panels : 0;
    if (whole > 0) {
      f(Part{map, map + whole}, Part{0, panels});
      u += whole * panels;
    } else {
      const Index last = smaller(panels, panel + units.end - u);
      f(Part{map, map + 1}, Part{panel, last});
      u += last - panel;
    }
  }
}

// Every pair writes a map of its own.
template <typename Conv, typename T, typename D>
void run_by_pair(const Conv& conv, const PairMaps<D>& dest, const Routes& routes,
                 bool shared_source, const BranchWeights<T>& weights, const Accumulator<T>* packed,
                 int threads) {
  constexpr Index kCacheBytes = 512 * 1024;
  const Index bytes =
      weights.layout().elements() * weights.branches() * Index{sizeof(Accumulator<T>)};
  const bool by_image =
      packed != nullptr && shared_source && conv.copies_source() && bytes <= kCacheBytes;
  VisitList& visits = thread_visits();
  if (by_image) {
    visits.in_order(routes, {0, routes.pairs()});
  } else {
    visits.by_branch(routes, {0, routes.pairs()});
  }
  const Index panels = weights.layout().panel_count();
  threads = useful_threads(threads, conv.multiply_adds() * double(routes.pairs()));
  parallel(threads, [&](int thread, int of) {
    typename Conv::Worker worker(conv, dest);
    BranchRunner<T, typename Conv::Worker> runner(worker, conv.group(), weights, packed);
    for_maps(part_of(routes.pairs() * panels, thread, of), panels, [&](Part pairs, Part part) {
      runner.run(visits.data() + pairs.begin, pairs.end - pairs.begin, part, by_image);
    });
  });
}

// Adds into the maps of images, or writes them with each image's first visit.
template <typename Conv, typename T, typename D>
void run_images(const Conv& conv, const PairMaps<D>& dest, const Routes& routes, Part images,
                Part panels, const BranchWeights<T>& weights, const Accumulator<T>* packed,
                bool add) {
  VisitList& visits = thread_visits();
  visits.by_branch(routes, {images.begin * routes.k, images.end * routes.k});
  if (add) {
    visits.mark_none_first();
  } else {
    visits.mark_first_of_images(routes, images);
  }
  typename Conv::Worker worker(conv, dest);
  BranchRunner<T, typename Conv::Worker> runner(worker, conv.group(), weights, packed);
  runner.run(visits.data(), visits.size(), panels, false);
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
