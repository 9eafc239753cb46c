// What the multiply-add units of one core deliver with everything in registers: the floor that
// benchmarks measure their distance to. Compiled once per instruction set.

#include "cpu/fma_peak.h"

#include "cpu/vec.h"

namespace pyeff::cpu::PYEFF_ISA {

extern const FmaLoop fma_loop = [](std::int64_t repeats) -> double {
  // More chains than latency times throughput on any of our machines.
  constexpr int kChains = kVecBytes == 16 ? 8 : 12;
  const Vec<float> factor = Vec<float>{} + 0.999f, term = Vec<float>{} + 1e-3f;
  Vec<float> sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = Vec<float>{} + static_cast<float>(i);
  for (std::int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + term;
  }
  Vec<float> total{};
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) total += sum[i];
  volatile float used = total[0];  // without a use the loop would go
  (void)used;
  return 2.0 * kChains * kLanes<float> * static_cast<double>(repeats);
};

}  // namespace pyeff::cpu::PYEFF_ISA
