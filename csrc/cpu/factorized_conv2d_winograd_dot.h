#pragma once
// A line of three taps and stride 1 in bfloat16 as Winograd's F(2, 3): two outputs from four inputs
// with four products instead of six. Inputs are combined in float32 and rounded to bfloat16 again
// for the dot products; what the four products make of two outputs never leaves the registers.

#ifdef __AVX512BF16__

#include "cpu/factorized_conv2d_dot.h"
#include "cpu/factorized_conv2d_winograd.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

using DotWinogradItem = WinogradItem<std::uint16_t, kPairPoints, kPairOutputs>;

// A tile of items whose combined inputs lie side by side.
struct DotWinogradCall {
  const std::uint16_t* in;   // of the first item, at the first point
  Index in_pixel, in_point;  // from item to item, from point to point
  const std::uint32_t* b;    // at the first point
  Index b_point, b_step;     // in pairs
  Index pairs;
  const float *init, *scale, *shift;  // scale and shift may both be null
  const DotWinogradItem* items;
  Index lane;
  Activation activation;
  bool clamps;
  Bounds<float> bounds;
};

template <int Z>
struct DotWinogradTile {
  static_assert(Z == 1 || Z == 2);
  static constexpr int kLanesOf = kLanes<float>;

  template <int P>
  static void run(const DotWinogradCall& call) {
    __m512 first[P][Z], second[P][Z];
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) {
      const __m512 init = _mm512_loadu_ps(call.init + z * kLanesOf);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        first[p][z] = init;
        second[p][z] = _mm512_setzero_ps();
      }
    }
    prefetch_outputs<P>(call);
    add_points<P>(call, 1, 2, first, second);
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const __m512 sum = first[p][z] + second[p][z], rest = first[p][z] - second[p][z];
        first[p][z] = sum;
        second[p][z] = rest;
      }
    }
    add_points<P>(call, 0, 3, first, second);
    finish<P>(call, 0, first);
    finish<P>(call, 1, second);
  }

 private:
  static __m512i pair_at(const std::uint16_t* a) {
    std::int32_t bits;
    std::memcpy(&bits, a, sizeof bits);
    return _mm512_set1_epi32(bits);
  }

  template <int P>
  static void prefetch_outputs(const DotWinogradCall& call) {
    for (int p = 0; p < P; ++p) {
      for (Index j = 0; j < kPairOutputs; ++j) {
        const DotWinogradItem& item = call.items[p];
        if (item.out[j] != nullptr) prefetch_to_write(item.out[j] + call.lane);
        if (item.residual[j] != nullptr) prefetch(item.residual[j] + call.lane);
      }
    }
  }

  // a += the products at one point, b += those at another.
  template <int P>
  static void add_points(const DotWinogradCall& call, Index point_a, Index point_b,
                         __m512 (&a)[P][Z], __m512 (&b)[P][Z]) {
    RowPointers<std::uint16_t, P> in_a(call.in + point_a * call.in_point, call.in_pixel);
    RowPointers<std::uint16_t, P> in_b(call.in + point_b * call.in_point, call.in_pixel);
    const std::uint32_t *w_a = call.b + point_a * call.b_point,
                        *w_b = call.b + point_b * call.b_point;
    for (Index k = call.pairs; k > 0; --k, w_a += call.b_step, w_b += call.b_step) {
      add<P>(in_a, call.in_pixel, w_a, a);
      add<P>(in_b, call.in_pixel, w_b, b);
      in_a.advance(2);
      in_b.advance(2);
    }
  }

  template <int P>
  static void add(const RowPointers<std::uint16_t, P>& in, Index pixel, const std::uint32_t* b,
                  __m512 (&acc)[P][Z]) {
    __m512i weight[Z];
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) weight[z] = _mm512_loadu_si512(b + z * kLanesOf);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const __m512i at = pair_at(&in.group[p / kRowGroup][p % kRowGroup * pixel]);
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) {
        acc[p][z] = _mm512_dpbf16_ps(acc[p][z], reinterpret_cast<__m512bh>(weight[z]),
                                     reinterpret_cast<__m512bh>(at));
      }
    }
  }

  template <int P>
  static void finish(const DotWinogradCall& call, Index j, __m512 (&acc)[P][Z]) {
    if (call.scale != nullptr) {
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) {
        const __m512 scale = _mm512_loadu_ps(call.scale + z * kLanesOf);
        const __m512 shift = _mm512_loadu_ps(call.shift + z * kLanesOf);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) acc[p][z] = _mm512_fmadd_ps(acc[p][z], scale, shift);
      }
    }
    const __m512 low = _mm512_set1_ps(call.bounds.low), high = _mm512_set1_ps(call.bounds.high);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      std::uint16_t* const out = call.items[p].out[j];
      if (out == nullptr) continue;
      const std::uint16_t* const residual = call.items[p].residual[j];
      if (residual != nullptr) {
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) acc[p][z] += widened(residual + call.lane + z * kLanesOf);
      }
      if (call.clamps) {
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) {
          acc[p][z] = acc[p][z] < low ? low : acc[p][z];
          acc[p][z] = acc[p][z] > high ? high : acc[p][z];
        }
      } else if (call.activation != Activation::kNone) {
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) acc[p][z] = bent(acc[p][z], call.activation);
      }
      if constexpr (Z == 2) {
        store_narrowed(out + call.lane, acc[p][0], acc[p][1]);
      } else {
        store_narrowed(out + call.lane, acc[p][0]);
      }
    }
  }

  // Activations that would take registers from the sums.
  __attribute__((noinline)) static __m512 bent(__m512 v, Activation activation) {
    return reinterpret_cast<__m512>(activated<float>(reinterpret_cast<Vec<float>>(v), activation));
  }
};

class DotWinogradLine {
 public:
  using Element = std::uint16_t;
  using Item = DotWinogradItem;
  static constexpr int kOutputs = kPairOutputs, kPoints = kPairPoints;

  explicit DotWinogradLine(const LineKernel<float>& line)
      : line_(line),
        channels_(readable_channels(line.layout.in)),
        in_pixel_(band_pixel<Element>(channels_, 1)) {}

  // Inputs are read in blocks of so many channels; what does not exist of them is zero.
  static Index readable_channels(Index channels) {
    return (channels + kPairBlock - 1) / kPairBlock * kPairBlock;
  }
  static Index memory(const LineLayout& layout) {
    return kPoints * kChunk * band_pixel<Element>(readable_channels(layout.in), 1);
  }

  // fill(q, item) describes item q of `count`; `memory` holds memory(layout) elements.
  template <typename Fill>
  void run(Index count, Element* memory, const Fill& fill) const {
    Item items[kChunk];
    const int tiles = static_cast<int>(ceil_div(count, Index{kTileItems}));
    for (int t = 0; t < tiles; t += kChunkTiles) {
      const int end_tile = static_cast<int>(smaller(t + kChunkTiles, tiles));
      const Index first = part_of(count, t, tiles).begin;
      const Index end = part_of(count, end_tile - 1, tiles).end;
      for (Index q = first; q < end; ++q) {
        fill(q, items[q - first]);
        combine(items[q - first], memory + (q - first) * in_pixel_);
      }
      multiply(end - first, end_tile - t, memory, items);
    }
  }

 private:
  static constexpr int kTileItems = kTilePixels / kPairOutputs;
  static constexpr int kChunkTiles = 4;
  static constexpr Index kChunk = kChunkTiles * kTileItems;

  // Both channels of a pair in float32: the lower and the upper half of every word. Compiler
  // vectors, since GCC 12 warns about intrinsics that shift.
  typedef std::uint32_t Words __attribute__((vector_size(64)));
  struct Halves {
    __m512 low, high;
  };
  static Halves halves(const Element* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return {reinterpret_cast<__m512>(words << 16), reinterpret_cast<__m512>(words & 0xffff0000u)};
  }
  // The lower halves come to lie before the upper ones; the weights do, too.
  static void put(Element* to, __m512 low, __m512 high) {
    const __m512bh bits = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(to, &bits, sizeof bits);
  }

  void combine(const Item& item, Element* to) const {
    const Index step = kChunk * in_pixel_, channels = channels_;
    const Element *const in0 = item.in[0], *const in1 = item.in[1], *const in2 = item.in[2],
                         *const in3 = item.in[3];
    for (Index c = 0; c < channels; c += kPairBlock, to += kPairBlock) {
      const Halves x0 = halves(in0 + c), x1 = halves(in1 + c);
      const Halves x2 = halves(in2 + c), x3 = halves(in3 + c);
      put(to, x0.low - x2.low, x0.high - x2.high);
      put(to + step, x1.low + x2.low, x1.high + x2.high);
      put(to + 2 * step, x2.low - x1.low, x2.high - x1.high);
      put(to + 3 * step, x3.low - x1.low, x3.high - x1.high);
    }
  }

  template <int Z>
  struct Table {
    void (*by_size[kTileItems])(const DotWinogradCall&);

    constexpr Table() : by_size{} { fill<1>(); }

   private:
    template <int P>
    constexpr void fill() {
      by_size[P - 1] = &DotWinogradTile<Z>::template run<P>;
      if constexpr (P < kTileItems) fill<P + 1>();
    }
  };

  void multiply(Index count, int tiles, const Element* in, const Item* items) const {
    static constexpr Table<1> kNarrowTiles;
    static constexpr Table<2> kPanelTiles;
    const LineLayout& layout = line_.layout;
    const auto* weights = reinterpret_cast<const std::uint32_t*>(line_.pairs);
    DotWinogradCall call{};
    call.in_pixel = in_pixel_;
    call.in_point = kChunk * in_pixel_;
    call.pairs = layout.pairs();
    call.activation = line_.activation;
    call.clamps = clamps(line_.activation);
    call.bounds = bounds_of<float>(line_.activation);
    Part parts[kChunkTiles];  // divided once, not for every panel
    for (int t = 0; t < tiles; ++t) parts[t] = part_of(count, t, tiles);
    for (Index lane = 0; lane < layout.lanes(); lane += kPanel) {
      call.b = weights + layout.pair_offset(lane, 0);
      call.b_step = layout.width(lane);
      call.b_point = call.pairs * call.b_step;
      call.lane = lane;
      call.init = line_.init + lane;
      if (line_.scale != nullptr) {
        call.scale = line_.scale + lane;
        call.shift = line_.shift + lane;
      }
      for (int t = 0; t < tiles; ++t) {
        const Part part = parts[t];
        call.in = in + part.begin * in_pixel_;
        call.items = items + part.begin;
        const Index size = part.end - part.begin - 1;
        (call.b_step == kPanel ? kPanelTiles.by_size[size] : kNarrowTiles.by_size[size])(call);
      }
    }
  }

  const LineKernel<float>& line_;
  Index channels_, in_pixel_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA

#endif  // __AVX512BF16__
