// What the multiply-add units of one core deliver with everything in registers: the floor that
// benchmarks measure their distance to. Compiled once per instruction set.

#include "cpu/fma_peak.h"

#include "cpu/vec.h"

namespace pyeff::cpu::PYEFF_ISA {

extern const FmaLoop fma_loop = [](std::int64_t repeats) -> double {
  // More chains than latency times throughput on any of our machines.
  constexpr int kChains = kVecBytes == 16 ? 8 : 12;
  Vec<float> sum[kChains], factor = Vec<float>{} + 0.999f, term = Vec<float>{} + 1e-3f;
  for (int i = 0; i < kChains; ++i) sum[i] = Vec<float>{} + static_cast<float>(i);
  for (std::int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + term;
#if defined(__x86_64__)
    asm volatile("" : "+v"(sum[0]), "+v"(factor));  // the loop may not be folded
#else
    asm volatile("" : "+w"(sum[0]), "+w"(factor));
#endif
  }
  volatile float used = 0;
  for (int i = 0; i < kChains; ++i) used = used + sum[i][0];
  return 2.0 * kChains * kLanes<float> * static_cast<double>(repeats);
};

}  // namespace pyeff::cpu::PYEFF_ISA
