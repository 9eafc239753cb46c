#pragma once
// A loop of independent multiply-adds in registers, for the floor of a benchmark.

#include <cstdint>

namespace pyeff::cpu {

using FmaLoop = double (*)(std::int64_t repeats);  // returns the floating-point operations done

namespace generic {
extern const FmaLoop fma_loop;
}
namespace avx2 {
extern const FmaLoop fma_loop;
}
namespace avx512 {
extern const FmaLoop fma_loop;
}
namespace amx {
extern const FmaLoop fma_loop;
}

// On `threads` threads at once; returns the floating-point operations of all of them.
double run_fma_loop(std::int64_t repeats, int threads);

}  // namespace pyeff::cpu
