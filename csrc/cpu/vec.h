#pragma once
// The vector registers of one instruction set, as compiler vectors: one source serves all of them.
// Everything in these headers is private to its object file (anonymous namespace), so that no code
// compiled for a newer instruction set can be picked for an older one by the linker.

#include <cstdint>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace pyeff::cpu::PYEFF_ISA {
namespace {

using Index = std::int64_t;

// Registers of the tile: kTilePixels x kTileVecs accumulators, kTileVecs weights and one pixel.
#if defined(__AVX512F__)
constexpr int kVecBytes = 64, kTilePixels = 14, kTileVecs = 2;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32, kTilePixels = 6, kTileVecs = 2;
#elif defined(__aarch64__)
constexpr int kVecBytes = 16, kTilePixels = 6, kTileVecs = 4;
#else
constexpr int kVecBytes = 16, kTilePixels = 4, kTileVecs = 2;
#endif

template <typename A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVecBytes)));
  typedef A unaligned __attribute__((vector_size(kVecBytes), aligned(alignof(A)), may_alias));
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(A));

template <typename A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VecOf<A>::unaligned*>(p);
}
template <typename A>
inline void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename VecOf<A>::unaligned*>(p) = v;
}

// Fetches the line of `p`. GCC takes a loop of nothing but prefetches for an empty one and removes
// it; the empty asm statement keeps it.
inline void prefetch(const void* p) {
  __builtin_prefetch(p);
  asm volatile("");
}
inline void prefetch_to_write(const void* p) {
  __builtin_prefetch(p, 1);
  asm volatile("");
}

inline Index smaller(Index a, Index b) { return a < b ? a : b; }
inline Index larger(Index a, Index b) { return a > b ? a : b; }
inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// --- element types: stored as T, computed as Accumulator<T> --------------------------------------

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

inline float float_of_bits(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(BFloat16 v) { return float_of_bits(static_cast<std::uint32_t>(v.bits) << 16); }
inline float widen(Float16 v) {
#ifdef __F16C__
  return _cvtsh_ss(v.bits);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000u) << 16;
  const std::uint32_t rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Multiplying by 2^112 moves the exponent to float's bias and makes subnormal numbers normal.
  return float_of_bits(sign | bits_of_float(float_of_bits(rest << 13) * 0x1p112f));
#endif
}

// Round to nearest, ties to even, as torch does.
inline void narrow(float v, float& out) { out = v; }
inline void narrow(double v, double& out) { out = v; }
inline void narrow(float v, BFloat16& out) {
  const std::uint32_t bits = bits_of_float(v);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void narrow(float v, Float16& out) {
#ifdef __F16C__
  out.bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
  const std::uint32_t bits = bits_of_float(v), sign = (bits >> 16) & 0x8000u;
  const std::uint32_t rest = bits & 0x7fffffffu;
  std::uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at the last subnormal bit
    half = bits_of_float(float_of_bits(rest) + 0.5f) - bits_of_float(0.5f);
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<std::uint16_t>(sign | half);
#endif
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
