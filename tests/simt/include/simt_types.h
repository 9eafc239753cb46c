#pragma once
// CUDA's types for the host, and arithmetic that has no operand in another lane: what the kernels
// use of them.

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

template <typename To, typename From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Converts as CUDA's types do: from numbers and to float without a word.
template <typename Format>
struct Number16 {
  std::uint16_t bits;

  Number16() = default;
  template <typename Number>
  Number16(Number value) : bits(Format::rounded(value)) {}
  operator float() const { return Format::widened(bits); }
};

struct HalfFormat {
  template <typename Number>
  static std::uint16_t rounded(Number value) {
    return bits_as<std::uint16_t>(static_cast<_Float16>(value));
  }
  static float widened(std::uint16_t bits) { return static_cast<float>(bits_as<_Float16>(bits)); }
};

struct BrainFormat {
  static std::uint16_t rounded(float value) {
    const std::uint32_t word = bits_as<std::uint32_t>(value);
    if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // not a number
    return static_cast<std::uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
  }
  static float widened(std::uint16_t bits) { return bits_as<float>(std::uint32_t{bits} << 16); }
};

}  // namespace simt

using __half = simt::Number16<simt::HalfFormat>;
using __nv_bfloat16 = simt::Number16<simt::BrainFormat>;

inline float __uint_as_float(unsigned value) { return simt::bits_as<float>(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
