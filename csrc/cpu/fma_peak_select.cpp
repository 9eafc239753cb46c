#include "cpu/fma_peak.h"
#include "cpu/isa.h"

namespace pyeff::cpu {
namespace {

FmaLoop loop() {
  switch (isa()) {
#ifdef PYEFF_HAVE_AMX
    case Isa::kAmx:
      return amx::fma_loop;
#endif
#ifdef PYEFF_HAVE_AVX512
    case Isa::kAvx512:
      return avx512::fma_loop;
#endif
#ifdef PYEFF_HAVE_AVX2
    case Isa::kAvx2:
      return avx2::fma_loop;
#endif
    default:
      return generic::fma_loop;
  }
}

}  // namespace

double run_fma_loop(std::int64_t repeats, int threads) {
  const FmaLoop run = loop();
  double operations = 0;
#pragma omp parallel num_threads(threads) reduction(+ : operations)
  operations += run(repeats);
  return operations;
}

}  // namespace pyeff::cpu
