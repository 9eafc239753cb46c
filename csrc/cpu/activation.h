#pragma once
// Activations on vectors. NaN stays NaN, as in torch.

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/vec.h"
#include "pyeff/activation.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

template <typename A>
inline Vec<A> clamped(Vec<A> v, A low, A high) {
  const Vec<A> lowest = Vec<A>{} + low, highest = Vec<A>{} + high;
  v = v < lowest ? lowest : v;
  return v > highest ? highest : v;
}

template <typename A>
struct Bounds {
  A low, high;
};
template <typename A>
inline Bounds<A> bounds_of(Activation activation) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  if (activation == Activation::kRelu) return {A(0), kInfinity};
  if (activation == Activation::kRelu6) return {A(0), A(6)};
  return {-kInfinity, kInfinity};
}
inline bool clamps(Activation activation) {
  return activation == Activation::kRelu || activation == Activation::kRelu6;
}

inline Vec<double> exp_of(Vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = std::exp(x[l]);
  return x;
}

// 2^n e^r with r in [-ln(2) / 2, ln(2) / 2]; the polynomial is Cephes', within two units in the
// last place.
inline Vec<float> exp_of(Vec<float> x) {
  typedef std::int32_t Ints __attribute__((vector_size(kVecBytes)));
  constexpr float kLogOf2High = 0.693359375f, kLogOf2Low = -2.12194440e-4f;
  const Vec<float> bounded = clamped<float>(x, -87.0f, 88.0f);
  const Vec<float> halves = bounded * 1.44269504f;
  const Ints n = __builtin_convertvector(
      halves + (halves < 0.0f ? Vec<float>{} - 0.5f : Vec<float>{} + 0.5f), Ints);
  const Vec<float> whole = __builtin_convertvector(n, Vec<float>);
  const Vec<float> r = bounded - whole * kLogOf2High - whole * kLogOf2Low;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = (n + 127) << 23;
  Vec<float> scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x != x ? x : p * scale;
}

template <typename A>
inline Vec<A> activated(Vec<A> v, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return v < A(0) ? Vec<A>{} : v;
    case Activation::kRelu6:
      return clamped<A>(v, A(0), A(6));
    case Activation::kSilu:
      return v / (exp_of(-v) + A(1));
    case Activation::kHardswish:
      return v * clamped<A>(v + A(3), A(0), A(6)) / A(6);
    case Activation::kNone:
      return v;
  }
  return v;
}

// grad times the derivative at v; of relu and relu6 also where v is their result. Where the
// derivative is zero on a whole side the result is zero whatever grad is, as in torch.
template <typename A>
inline Vec<A> through_activation(Vec<A> grad, Vec<A> v, Activation activation) {
  const Vec<A> zero{}, one = zero + A(1);
  switch (activation) {
    case Activation::kRelu:
      return v <= A(0) ? zero : grad;
    case Activation::kRelu6:
      return v <= A(0) ? zero : v >= A(6) ? zero : grad;
    case Activation::kSilu: {
      const Vec<A> share = one / (exp_of(-v) + A(1));
      return grad * (share * (v * (one - share) + A(1)));
    }
    case Activation::kHardswish:
      return v <= A(-3) ? zero : v >= A(3) ? grad : grad * (v / A(3) + A(0.5));
    case Activation::kNone:
      return grad;
  }
  return grad;
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
