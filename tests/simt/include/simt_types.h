#pragma once
// CUDA's types and arithmetic for the host: vectors, half, bfloat16 and what has no operand in
// another lane.

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace simt {
template <typename To, typename From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace simt

// Conversions as CUDA has them: from numbers and to float without a word. Arithmetic of two of them
// rounds; with a float it is ambiguous, as it is there.
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

#define SIMT_ARITHMETIC(T)                                                                    \
  inline T operator+(T a, T b) { return static_cast<float>(a) + static_cast<float>(b); }      \
  inline T operator-(T a, T b) { return static_cast<float>(a) - static_cast<float>(b); }      \
  inline T operator*(T a, T b) { return static_cast<float>(a) * static_cast<float>(b); }      \
  inline T operator/(T a, T b) { return static_cast<float>(a) / static_cast<float>(b); }      \
  inline T operator-(T a) { return -static_cast<float>(a); }                                  \
  inline T& operator+=(T& a, T b) { return a = a + b; }                                       \
  inline bool operator<(T a, T b) { return static_cast<float>(a) < static_cast<float>(b); }   \
  inline bool operator>(T a, T b) { return static_cast<float>(a) > static_cast<float>(b); }   \
  inline bool operator<=(T a, T b) { return static_cast<float>(a) <= static_cast<float>(b); } \
  inline bool operator>=(T a, T b) { return static_cast<float>(a) >= static_cast<float>(b); } \
  inline bool operator==(T a, T b) { return static_cast<float>(a) == static_cast<float>(b); } \
  inline bool operator!=(T a, T b) { return static_cast<float>(a) != static_cast<float>(b); }
SIMT_ARITHMETIC(__half)
SIMT_ARITHMETIC(__nv_bfloat16)
#undef SIMT_ARITHMETIC

struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half2 = __half2;

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {value.x, value.y}; }

// --- arithmetic without another lane -------------------------------------------------------------

inline int __float_as_int(float value) { return simt::bits_as<int>(value); }
inline unsigned __float_as_uint(float value) { return simt::bits_as<unsigned>(value); }
inline float __int_as_float(int value) { return simt::bits_as<float>(value); }
inline float __uint_as_float(unsigned value) { return simt::bits_as<float>(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return b < a ? b : a; }
inline long max(long a, long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
