#pragma once
// The register tile for 16 channels that lie close together. A tap is too short to hide the
// bookkeeping of strides that are known only at run time; here every address is a constant away
// from one pointer, and a tile of one vector is twice as long.

#include "cpu/epilogue_tile.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

struct NarrowTile {
  static constexpr Index kChannels = kNarrow;  // of a pixel, and what is summed

  template <typename A>
  static constexpr int kVecs = static_cast<int>(kChannels) / kLanes<A>;
  template <typename A>
  static constexpr bool kExists = kVecs<A> >= 1 && kVecs<A> <= kTileVecs;
  template <typename A>
  static constexpr int kPixels = kTilePixels * kTileVecs / kVecs<A>;

  template <typename A, int P>
  static void run(const EpilogueCall<A>& call) {
    constexpr int Z = kVecs<A>;
    Vec<A> acc[P][Z];
    begin_epilogue_tile<A, P, Z>(call, acc);
    // The lines that are written at the end are fetched before, a few with every tap.
    const Index fetched = ceil_div(P, larger(call.tap_count, 1));
    const A *out = call.out, *residual = call.residual;
    for (Index t = 0; t < call.tap_count; ++t) {
      const A* a = call.taps[t].a + call.a_offset;
      const A* b = call.taps[t].b + call.b_offset;
      for (Index i = 0; i < fetched; ++i, out += call.out_pixel) prefetch_to_write(out);
      if (residual != nullptr) {
        for (Index i = 0; i < fetched; ++i, residual += call.residual_pixel) prefetch(residual);
      }
#pragma GCC unroll 2
      for (int k = 0; k < kChannels; ++k) {
        Vec<A> weight[Z];
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) weight[z] = load(b + k * kChannels + z * kLanes<A>);
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p) {
          const A pixel = a[p * kChannels + k];
#pragma GCC unroll 4
          for (int z = 0; z < Z; ++z) acc[p][z] += pixel * weight[z];
        }
      }
    }
    end_epilogue_tile<A, 1, P, Z>(call, acc);
  }

  // A row of pixels; between() is called before every tile.
  template <typename A, typename Between>
  static void run_row(EpilogueCall<A> call, Index cols, const Between& between) {
    static constexpr Table<A> kTable;
    A* const out = call.out;
    const A* const residual = call.residual;
    const Index a_offset = call.a_offset;
    const int tiles = static_cast<int>(ceil_div(cols, kPixels<A>));
    for (int t = 0; t < tiles; ++t) {
      const Part part = part_of(cols, t, tiles);
      call.a_offset = a_offset + part.begin * kChannels;
      call.out = out + part.begin * call.out_pixel;
      if (residual != nullptr) call.residual = residual + part.begin * call.residual_pixel;
      between();
      kTable.by_size[part.end - part.begin - 1](call);
    }
  }

 private:
  template <typename A>
  struct Table {
    EpilogueTileFunction<A> by_size[kPixels<A>];

    constexpr Table() : by_size{} { fill<1>(); }

   private:
    template <int P>
    constexpr void fill() {
      by_size[P - 1] = &NarrowTile::run<A, P>;
      if constexpr (P < kPixels<A>) fill<P + 1>();
    }
  };
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
