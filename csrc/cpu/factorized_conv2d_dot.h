#pragma once
// A line in bfloat16 with the dot products of AVX-512-BF16: pairs of channels are multiplied and
// summed in float32, twice as many as float32 alone would do. Rows of pixels, the middle map too,
// are bfloat16 bits in memory; biases, scale, shift and activations are applied in float32.

#ifdef __AVX512BF16__

#include <immintrin.h>

#include "cpu/factorized_conv2d_line.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

struct DotTap {
  const std::uint16_t* a;
  const std::uint32_t* b;
  Index pairs;
};

struct DotCall {
  const DotTap* taps;
  Index tap_count;
  Index a_offset, a_pixel;
  Index b_offset, b_step;             // in pairs
  const float *init, *scale, *shift;  // scale and shift may both be null
  const std::uint16_t* residual;      // or null
  Index residual_pixel;
  std::uint16_t* out;
  Index out_pixel;
  Activation activation;
  Bounds<float> bounds;
};

inline __m512 widened(const std::uint16_t* from) {
  typedef std::uint32_t Words __attribute__((vector_size(64)));
  __m256i bits;
  std::memcpy(&bits, from, sizeof bits);
  // Masked, since GCC 12 warns about the plain one; it makes the same instruction of both.
  const __m512i words = _mm512_maskz_cvtepu16_epi32(0xffff, bits);
  return reinterpret_cast<__m512>(reinterpret_cast<Words>(words) << 16);
}
inline void store_narrowed(std::uint16_t* to, __m512 v) {
  const __m256bh bits = _mm512_cvtneps_pbh(v);
  std::memcpy(to, &bits, sizeof bits);
}
inline void store_narrowed(std::uint16_t* to, __m512 first, __m512 second) {
  const __m512bh bits = _mm512_cvtne2ps_pbh(second, first);
  std::memcpy(to, &bits, sizeof bits);
}

// Vectors of channels are one pixel after the other; kChannels > 0 says that pixels have so many
// channels and lie side by side, which makes every address a constant away from one pointer.
template <int kChannels>
struct DotTile {
  static constexpr int kLanesOf = kLanes<float>;

  template <int P, int Z>
  static void run(const DotCall& call) {
    __m512 acc[P][Z];
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) {
      const __m512 init = _mm512_loadu_ps(call.init + z * kLanesOf);
#pragma GCC unroll 32
      for (int p = 0; p < P; ++p) acc[p][z] = init;
    }
    const Index fetched = ceil_div(P, larger(call.tap_count, 1));
    const std::uint16_t *out = call.out, *residual = call.residual;
    for (Index t = 0; t < call.tap_count; ++t) {
      const std::uint16_t* a = call.taps[t].a + call.a_offset;
      const std::uint32_t* b = call.taps[t].b + call.b_offset;
      for (Index i = 0; i < fetched; ++i, out += call.out_pixel) prefetch_to_write(out);
      if (residual != nullptr) {
        for (Index i = 0; i < fetched; ++i, residual += call.residual_pixel) prefetch(residual);
      }
      if constexpr (kChannels > 0) {
        add_tap<P, Z>(a, b, acc);
      } else {
        add_tap<P, Z>(a, call.a_pixel, b, call.b_step, call.taps[t].pairs, acc);
      }
    }
    finish<P, Z>(call, acc);
  }

 private:
  static __m512i pair_at(const std::uint16_t* a) {
    std::int32_t bits;
    std::memcpy(&bits, a, sizeof bits);
    return _mm512_set1_epi32(bits);
  }

  template <int P, int Z>
  static void add_tap(const std::uint16_t* a, const std::uint32_t* b, __m512 (&acc)[P][Z]) {
#pragma GCC unroll 2
    for (int k = 0; k < kChannels / 2; ++k, b += Z * kLanesOf) {
      __m512i weight[Z];
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) weight[z] = _mm512_loadu_si512(b + z * kLanesOf);
#pragma GCC unroll 32
      for (int p = 0; p < P; ++p) multiply<Z>(pair_at(a + p * kChannels + 2 * k), weight, acc[p]);
    }
  }

  template <int P, int Z>
  static void add_tap(const std::uint16_t* first, Index pixel, const std::uint32_t* b, Index b_step,
                      Index pairs, __m512 (&acc)[P][Z]) {
    RowPointers<std::uint16_t, P> a(first, pixel);
    for (; pairs > 0; --pairs, b += b_step) {
      __m512i weight[Z];
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) weight[z] = _mm512_loadu_si512(b + z * kLanesOf);
#pragma GCC unroll 32
      for (int p = 0; p < P; ++p) {
        multiply<Z>(pair_at(&a.group[p / kRowGroup][p % kRowGroup * pixel]), weight, acc[p]);
      }
      a.advance(2);
    }
  }

  template <int Z>
  static void multiply(__m512i pixel, const __m512i (&weight)[Z], __m512 (&acc)[Z]) {
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) {
      acc[z] = _mm512_dpbf16_ps(acc[z], reinterpret_cast<__m512bh>(weight[z]),
                                reinterpret_cast<__m512bh>(pixel));
    }
  }

  template <int P, int Z>
  static void finish(const DotCall& call, __m512 (&acc)[P][Z]) {
    if (call.scale != nullptr) {
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) {
        const __m512 scale = _mm512_loadu_ps(call.scale + z * kLanesOf);
        const __m512 shift = _mm512_loadu_ps(call.shift + z * kLanesOf);
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p) acc[p][z] = _mm512_fmadd_ps(acc[p][z], scale, shift);
      }
    }
    if (call.residual != nullptr) {
#pragma GCC unroll 32
      for (int p = 0; p < P; ++p) {
        const std::uint16_t* from = call.residual + p * call.residual_pixel;
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) {
          acc[p][z] = _mm512_add_ps(acc[p][z], widened(from + z * kLanesOf));
        }
      }
    }
    if (clamps(call.activation)) {
#pragma GCC unroll 32
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) {
          acc[p][z] = clamped<float>(acc[p][z], call.bounds.low, call.bounds.high);
        }
      }
      write<P, Z>(call, acc);
    } else if (call.activation == Activation::kNone) {
      write<P, Z>(call, acc);
    } else {
      finish_in_memory<P, Z>(call, acc);
    }
  }

  // Two vectors at a time where they lie side by side.
  template <int P, int Z>
  static void write(const DotCall& call, const __m512 (&acc)[P][Z]) {
    static_assert(Z == 1 || Z == 2);
    std::uint16_t* const out = call.out;
    const Index pixel = call.out_pixel;
    if constexpr (Z == 2) {
#pragma GCC unroll 32
      for (int p = 0; p < P; ++p) store_narrowed(out + p * pixel, acc[p][0], acc[p][1]);
    } else {
      const bool dense = pixel == kLanesOf;
#pragma GCC unroll 32
      for (int p = 0; p < P; p += 2) {
        if (p + 1 < P && dense) {
          store_narrowed(out + p * kLanesOf, acc[p][0], acc[p + 1 < P ? p + 1 : p][0]);
        } else {
          store_narrowed(out + p * pixel, acc[p][0]);
          if (p + 1 < P) store_narrowed(out + (p + 1) * pixel, acc[p + 1 < P ? p + 1 : p][0]);
        }
      }
    }
  }

  // Activations that would take registers from the sums.
  template <int P, int Z>
  static void finish_in_memory(const DotCall& call, const __m512 (&acc)[P][Z]) {
    alignas(kVecBytes) float sums[P][Z][kLanesOf];
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) _mm512_store_ps(sums[p][z], acc[p][z]);
    }
    activate_pixels(call, &sums[0][0][0], P, Z * kLanesOf);
  }

  __attribute__((noinline)) static void activate_pixels(const DotCall& call, const float* sums,
                                                        int pixels, int lanes) {
    for (int p = 0; p < pixels; ++p) {
      for (int l = 0; l < lanes; l += kLanesOf, sums += kLanesOf) {
        const __m256bh bits = _mm512_cvtneps_pbh(activated<float>(load(sums), call.activation));
        std::memcpy(call.out + p * call.out_pixel + l, &bits, sizeof bits);
      }
    }
  }
};

using DotFunction = void (*)(const DotCall&);

// Tiles of one vector are twice as long.
template <int kChannels, int Z>
struct DotTable {
  static constexpr int kPixels = kTilePixels * kTileVecs / Z;
  DotFunction by_size[kPixels];

  constexpr DotTable() : by_size{} { fill<1>(); }

 private:
  template <int P>
  constexpr void fill() {
    by_size[P - 1] = &DotTile<kChannels>::template run<P, Z>;
    if constexpr (P < kPixels) fill<P + 1>();
  }
};

// Runs the rows of a line as LineConv does, on bfloat16 bits.
class DotLineConv {
 public:
  using Row = std::uint16_t;

  DotLineConv(const LineKernel<float>& line, Tap<float>* taps)
      : line_(line), taps_(reinterpret_cast<DotTap*>(taps)) {
    static_assert(sizeof(DotTap) == sizeof(Tap<float>) && alignof(DotTap) == alignof(Tap<float>));
  }

  static Index readable_channels(Index channels) { return (channels + 1) / 2 * 2; }

  Index tiles(Index cols) const {
    return ceil_div(cols, kTilePixels) * ceil_div(line_.layout.lanes(), kPanel);
  }

  template <typename Between>
  void run(const RowTap<Row>* row_taps, Index tap_count, Index a_pixel, Index cols,
           const RowOut<Row>& out, const Between& between) const {
    const LineLayout& layout = line_.layout;
    DotCall call{};
    call.taps = taps_;
    call.a_pixel = a_pixel;
    call.residual_pixel = out.residual_pixel;
    call.out_pixel = out.pixel;
    call.activation = line_.activation;
    call.bounds = bounds_of<float>(line_.activation);
    const bool dense = layout.in == kNarrow && a_pixel == kNarrow;
    for (Index lane = 0; lane < layout.lanes(); lane += kPanel) {
      call.b_step = layout.width(lane);
      const bool constant = dense && call.b_step != kPanel;
      call.tap_count = list_taps(row_taps, tap_count, lane, !constant);
      call.init = line_.init + lane;
      if (line_.scale != nullptr) {
        call.scale = line_.scale + lane;
        call.shift = line_.shift + lane;
      }
      call.out = out.data + lane;
      call.residual = out.residual == nullptr ? nullptr : out.residual + lane;
      if (call.b_step == kPanel) {
        run_row<0, 2>(call, cols, between);
      } else if (constant) {
        run_row<kNarrow, 1>(call, cols, between);
      } else {
        run_row<0, 1>(call, cols, between);
      }
    }
  }

 private:
  template <int kChannels, int Z, typename Between>
  static void run_row(DotCall call, Index cols, const Between& between) {
    static constexpr DotTable<kChannels, Z> kTable;
    std::uint16_t* const out = call.out;
    const std::uint16_t* const residual = call.residual;
    const int tiles = static_cast<int>(ceil_div(cols, Index{kTable.kPixels}));
    for (int t = 0; t < tiles; ++t) {
      const Part part = part_of(cols, t, tiles);
      call.a_offset = part.begin * call.a_pixel;
      call.out = out + part.begin * call.out_pixel;
      if (residual != nullptr) call.residual = residual + part.begin * call.residual_pixel;
      between();
      kTable.by_size[part.end - part.begin - 1](call);
    }
  }

  // Neighbouring taps whose pixels follow each other become one longer sum where they may: a tile
  // of a constant number of channels takes every tap as one.
  Index list_taps(const RowTap<Row>* row_taps, Index tap_count, Index lane, bool merge) const {
    const LineLayout& layout = line_.layout;
    const auto* weights = reinterpret_cast<const std::uint32_t*>(line_.pairs);
    const Index width = layout.width(lane), pairs = layout.pairs();
    const bool merges = merge && layout.in % 2 == 0;
    Index count = 0;
    for (Index t = 0; t < tap_count; ++t) {
      const std::uint16_t* a = row_taps[t].a;
      const std::uint32_t* b = weights + layout.pair_offset(lane, row_taps[t].number);
      if (merges && count > 0) {
        DotTap& before = taps_[count - 1];
        if (before.a + before.pairs * 2 == a && before.b + before.pairs * width == b) {
          before.pairs += pairs;
          continue;
        }
      }
      taps_[count++] = {a, b, pairs};
    }
    return count;
  }

  const LineKernel<float>& line_;
  DotTap* taps_;
};

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA

#endif  // __AVX512BF16__
