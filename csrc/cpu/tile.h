#pragma once
// The register tile that every dense direction of nested_conv2d shares, an indirect convolution:
//   out[p][l] (+)= init[l] + sum_t sum_k taps[t].a[p * a_pixel + k * a_step]
//                                        * taps[t].b[k * b_step + l]
// for P <= kTilePixels rows p and Z * kLanes columns l that stay in registers.
//   forward, grad_input:  p pixels of a row, l output channels, k the channels that are summed
//   grad_weight:          p input channels,  l output channels, k the pixels of an image row
// The depth-wise tile has no sum over channels: its pixels are vectors of channels themselves.

#include "cpu/packed_layout.h"
#include "cpu/vec.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

template <typename A>
struct Tap {
  const A* a;
  const A* b;
  Index k;
};

template <typename A>
struct TileCall {
  const Tap<A>* taps;
  Index tap_count;
  Index a_offset, b_offset;  // added to the pointers of every tap
  Index a_pixel, a_step, b_step;
  const A* init;  // [Z * kLanes], or null to add to what is in out
  A* out;
  Index out_pixel;
};

template <typename A, int P, int Z>
inline void begin_tile(const TileCall<A>& call, Vec<A> (&acc)[P][Z]) {
#pragma GCC unroll 32
  for (int p = 0; p < P; ++p) {
    const A* from = call.init != nullptr ? call.init : call.out + p * call.out_pixel;
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) acc[p][z] = load(from + z * kLanes<A>);
  }
}

template <typename A, int P, int Z>
inline void end_tile(const TileCall<A>& call, const Vec<A> (&acc)[P][Z]) {
#pragma GCC unroll 32
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) store(call.out + p * call.out_pixel + z * kLanes<A>, acc[p][z]);
  }
}

// Pointers to every kRowGroup-th of the P rows. Rows of a group lie at the same few distances from
// their pointer; from one pointer for all, each row's distance would need a register of its own.
constexpr int kRowGroup = 5;
template <typename A, int P>
struct RowPointers {
  static constexpr int kGroups = (P + kRowGroup - 1) / kRowGroup;
  const A* group[kGroups];

  RowPointers(const A* first, Index row_stride) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      group[g] = first + g * kRowGroup * row_stride;
      asm volatile("" : "+r"(group[g]));  // or GCC finds the way back to one pointer
    }
  }
  A at(int row, Index row_stride) const {
    return group[row / kRowGroup][row % kRowGroup * row_stride];
  }
  void advance(Index step) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) group[g] += step;
  }
};

struct DenseTile {
  static constexpr bool kMergesTaps = true, kReadsInPlace = true, kLanesAreChannels = false;
  static constexpr bool kPrefetches = true;

  template <typename A, int P, int Z>
  static void run(const TileCall<A>& call) {
    Vec<A> acc[P][Z];
    begin_tile<A, P, Z>(call, acc);
    const Index a_pixel = call.a_pixel, a_step = call.a_step, b_step = call.b_step;
    // The lines that end_tile writes are fetched before, a few with every tap: all at once they
    // would fill the queue of outstanding misses. What is added to has been read already.
    const Index fetched = call.init != nullptr ? ceil_div(P, larger(call.tap_count, 1)) : 0;
    const A* out = call.out;
    for (Index t = 0; t < call.tap_count; ++t) {
      RowPointers<A, P> a(call.taps[t].a + call.a_offset, a_pixel);
      const A* b = call.taps[t].b + call.b_offset;
      for (Index i = 0; i < fetched; ++i, out += call.out_pixel) {
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) prefetch_to_write(out + z * kLanes<A>);
      }
      for (Index k = call.taps[t].k; k > 0; --k) {
        Vec<A> weight[Z];
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) weight[z] = load(b + z * kLanes<A>);
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p) {
          const A pixel = a.at(p, a_pixel);
#pragma GCC unroll 4
          for (int z = 0; z < Z; ++z) acc[p][z] += pixel * weight[z];
        }
        a.advance(a_step);
        b += b_step;
      }
    }
    end_tile<A, P, Z>(call, acc);
  }
};

struct DepthwiseTile {
  // Whole vectors of channels are read, some past the end of a pixel.
  static constexpr bool kMergesTaps = false, kReadsInPlace = false, kLanesAreChannels = true;
  static constexpr bool kPrefetches = false;  // too little work to hide it behind

  template <typename A, int P, int Z>
  static void run(const TileCall<A>& call) {
    Vec<A> acc[P][Z];
    begin_tile<A, P, Z>(call, acc);
    for (Index t = 0; t < call.tap_count; ++t) {
      const A* a = call.taps[t].a + call.a_offset;
      const A* b = call.taps[t].b + call.b_offset;
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) {
        const Vec<A> weight = load(b + z * kLanes<A>);
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p) {
          acc[p][z] += load(a + p * call.a_pixel + z * kLanes<A>) * weight;
        }
      }
    }
    end_tile<A, P, Z>(call, acc);
  }
};

template <typename A>
using TileFunction = void (*)(const TileCall<A>&);

// The tile function for every number of pixels and vectors up to the full tile.
template <typename Tile, typename A>
struct TileTable {
  TileFunction<A> by_size[kTileVecs][kTilePixels];

  constexpr TileTable() : by_size{} { fill<kTilePixels, kTileVecs>(); }

 private:
  template <int P, int Z>
  constexpr void fill() {
    by_size[Z - 1][P - 1] = &Tile::template run<A, P, Z>;
    if constexpr (P > 1) {
      fill<P - 1, Z>();
    } else if constexpr (Z > 1) {
      fill<kTilePixels, Z - 1>();
    }
  }
};

template <typename Tile, typename A>
inline void run_tile(int pixels, int vecs, const TileCall<A>& call) {
  static constexpr TileTable<Tile, A> kTable;
  kTable.by_size[vecs - 1][pixels - 1](call);
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
