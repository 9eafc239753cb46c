#pragma once
// The register tile of branch_stage and factorized_conv2d: R rows of W pixels times Z vectors of
// channels, with all that follows the convolution done before the results leave the registers.
//   out[r][w][l] = clamp(scale[l] * (init[l] + sum_t sum_k taps[t].a[r * a_row + w * a_pixel + k]
//                                                          * taps[t].b[k * b_step + l])
//                        + shift[l] + residual[r][w][l])
// Maps of 4 to 8 pixels a row would leave half of a tile of one row empty.

#include "cpu/activation.h"
#include "cpu/packed_layout.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

template <typename A>
struct EpilogueCall {
  const Tap<A>* taps;
  Index tap_count;
  Index a_offset, b_offset;  // added to the pointers of every tap
  Index a_row, a_pixel, b_step;
  const A* init;           // [Z * kLanes]
  const A *scale, *shift;  // likewise, or both null
  A* out;
  Index out_row, out_pixel;
  const A* residual;  // like out, or null
  Index residual_row, residual_pixel;
  bool clamps;
  A low, high;
};

template <typename A, int R, int W, int Z>
inline void end_epilogue_tile(const EpilogueCall<A>& call, Vec<A> (&acc)[R * W][Z]) {
  if (call.scale != nullptr) {
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) {
      const Vec<A> scale = load(call.scale + z * kLanes<A>);
      const Vec<A> shift = load(call.shift + z * kLanes<A>);
#pragma GCC unroll 32
      for (int p = 0; p < R * W; ++p) acc[p][z] = acc[p][z] * scale + shift;
    }
  }
  if (call.residual != nullptr) {
#pragma GCC unroll 32
    for (int p = 0; p < R * W; ++p) {
      const A* from = call.residual + p / W * call.residual_row + p % W * call.residual_pixel;
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) acc[p][z] += load(from + z * kLanes<A>);
    }
  }
  if (call.clamps) {
#pragma GCC unroll 32
    for (int p = 0; p < R * W; ++p) {
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) acc[p][z] = clamped<A>(acc[p][z], call.low, call.high);
    }
  }
#pragma GCC unroll 32
  for (int p = 0; p < R * W; ++p) {
    A* to = call.out + p / W * call.out_row + p % W * call.out_pixel;
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) store(to + z * kLanes<A>, acc[p][z]);
  }
}

template <typename A, int P, int Z>
inline void begin_epilogue_tile(const EpilogueCall<A>& call, Vec<A> (&acc)[P][Z]) {
#pragma GCC unroll 4
  for (int z = 0; z < Z; ++z) {
    const Vec<A> init = load(call.init + z * kLanes<A>);
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p) acc[p][z] = init;
  }
}

// Pointers to the pixels of R rows of W.
template <typename A, int R, int W>
struct TilePointers {
  RowPointers<A, W> first;
  TilePointers<A, R - 1, W> rest;

  TilePointers(const A* at, Index row, Index pixel)
      : first(at, pixel), rest(at + row, row, pixel) {}
  A at(int p, Index pixel) const { return p < W ? first.at(p, pixel) : rest.at(p - W, pixel); }
  void advance() {
    first.advance(1);
    rest.advance();
  }
};
template <typename A, int W>
struct TilePointers<A, 0, W> {
  TilePointers(const A*, Index, Index) {}
  A at(int, Index) const { return A(0); }
  void advance() {}
};

struct DenseEpilogueTile {
  template <typename A, int R, int W, int Z>
  static void run(const EpilogueCall<A>& call) {
    Vec<A> acc[R * W][Z];
    begin_epilogue_tile<A, R * W, Z>(call, acc);
    const Index a_pixel = call.a_pixel, b_step = call.b_step;
    for (Index t = 0; t < call.tap_count; ++t) {
      TilePointers<A, R, W> a(call.taps[t].a + call.a_offset, call.a_row, a_pixel);
      const A* b = call.taps[t].b + call.b_offset;
      for (Index k = call.taps[t].k; k > 0; --k) {
        Vec<A> weight[Z];
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) weight[z] = load(b + z * kLanes<A>);
#pragma GCC unroll 32
        for (int p = 0; p < R * W; ++p) {
          const A pixel = a.at(p, a_pixel);
#pragma GCC unroll 4
          for (int z = 0; z < Z; ++z) acc[p][z] += pixel * weight[z];
        }
        a.advance();
        b += b_step;
      }
    }
    end_epilogue_tile<A, R, W, Z>(call, acc);
  }
};

struct DepthwiseEpilogueTile {
  template <typename A, int R, int W, int Z>
  static void run(const EpilogueCall<A>& call) {
    Vec<A> acc[R * W][Z];
    begin_epilogue_tile<A, R * W, Z>(call, acc);
    for (Index t = 0; t < call.tap_count; ++t) {
      const A* a = call.taps[t].a + call.a_offset;
      const A* b = call.taps[t].b + call.b_offset;
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) {
        const Vec<A> weight = load(b + z * kLanes<A>);
#pragma GCC unroll 32
        for (int p = 0; p < R * W; ++p) {
          const A* pixel = a + p / W * call.a_row + p % W * call.a_pixel + z * kLanes<A>;
          acc[p][z] += load(pixel) * weight;
        }
      }
    }
    end_epilogue_tile<A, R, W, Z>(call, acc);
  }
};

// Pixels of a tile of `rows` rows and `vecs` vectors fill the registers, but no more.
constexpr int kEpilogueRows = 2;
constexpr int most_cols(int rows, int vecs) {
  if (rows == 1) return kTilePixels;
  return vecs == 1 && kTilePixels == 14 ? 8 : kTilePixels / rows;
}

// Panels are kNarrow or kPanel lanes wide, so that fewer vectors than this are never asked for.
template <typename A>
constexpr int kFewestVecs = kNarrow / kLanes<A> < kTileVecs ? kNarrow / kLanes<A> : kTileVecs;

template <typename A>
using EpilogueTileFunction = void (*)(const EpilogueCall<A>&);

template <typename Tile, typename A>
struct EpilogueTileTable {
  EpilogueTileFunction<A> by_size[kEpilogueRows][kTileVecs][kTilePixels];

  constexpr EpilogueTileTable() : by_size{} { fill<1, kFewestVecs<A>, 1>(); }

 private:
  template <int R, int Z, int W>
  constexpr void fill() {
    by_size[R - 1][Z - 1][W - 1] = &Tile::template run<A, R, W, Z>;
    if constexpr (W < most_cols(R, Z)) {
      fill<R, Z, W + 1>();
    } else if constexpr (Z < kTileVecs) {
      fill<R, Z + 1, 1>();
    } else if constexpr (R < kEpilogueRows) {
      fill<R + 1, kFewestVecs<A>, 1>();
    }
  }
};

template <typename Tile, typename A>
inline void run_epilogue_tile(int rows, int cols, int vecs, const EpilogueCall<A>& call) {
  static constexpr EpilogueTileTable<Tile, A> kTable;
  kTable.by_size[rows - 1][vecs - 1][cols - 1](call);
}

// How a map of `cols` columns is cut: the rows of a tile that leave the fewest registers empty.
inline int tile_rows(Index rows, Index cols, int vecs) {
  if (rows < kEpilogueRows) return 1;
  const auto pixels = [&](int r) { return r * double(cols) / ceil_div(cols, most_cols(r, vecs)); };
  return pixels(kEpilogueRows) > 1.1 * pixels(1) ? kEpilogueRows : 1;
}

// A map of rows x cols in tiles.
template <typename Tile, typename A>
void run_tiles(EpilogueCall<A> call, Index rows, Index cols, int vecs) {
  A* const out = call.out;
  const A* const residual = call.residual;
  const Index a_offset = call.a_offset;
  const int most_rows = tile_rows(rows, cols, vecs);
  for (Index r = 0; r < rows;) {
    const int tall = static_cast<int>(smaller(most_rows, rows - r));
    const int tiles = static_cast<int>(ceil_div(cols, most_cols(tall, vecs)));
    for (int t = 0; t < tiles; ++t) {
      const Part part = part_of(cols, t, tiles);
      call.a_offset = a_offset + r * call.a_row + part.begin * call.a_pixel;
      call.out = out + r * call.out_row + part.begin * call.out_pixel;
      if (residual != nullptr) {
        call.residual = residual + r * call.residual_row + part.begin * call.residual_pixel;
      }
      run_epilogue_tile<Tile>(tall, static_cast<int>(part.end - part.begin), vecs, call);
    }
    r += tall;
  }
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
