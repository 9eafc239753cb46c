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
}  // namespace simt

// Conversions as CUDA has them: from numbers and to float without a word.
struct __half {
  std::uint16_t bits;

  __half() = default;
  __half(float value) : bits(simt::bits_as<std::uint16_t>(static_cast<_Float16>(value))) {}
  __half(double value) : bits(simt::bits_as<std::uint16_t>(static_cast<_Float16>(value))) {}
  __half(int value) : __half(static_cast<double>(value)) {}
  operator float() const { return static_cast<float>(simt::bits_as<_Float16>(bits)); }
};
using half = __half;

struct __nv_bfloat16 {
  std::uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : bits(rounded(value)) {}
  __nv_bfloat16(double value) : bits(rounded(static_cast<float>(value))) {}
  __nv_bfloat16(int value) : bits(rounded(static_cast<float>(value))) {}
  operator float() const { return simt::bits_as<float>(std::uint32_t{bits} << 16); }

 private:
  static std::uint16_t rounded(float value) {
    const std::uint32_t word = simt::bits_as<std::uint32_t>(value);
    if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // not a number
    return static_cast<std::uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
  }
};

inline float __uint_as_float(unsigned value) { return simt::bits_as<float>(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
