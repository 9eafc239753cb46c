#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyeff::cpu {
namespace {

constexpr int kNotForced = -1;
std::atomic<int> forced{kNotForced};

// One test for every flag that the object file of `isa` was compiled with (CMakeLists.txt).
bool machine_has(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kAvx2:
#ifdef PYEFF_HAVE_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::kAvx512:
#ifdef PYEFF_HAVE_AVX512
      return machine_has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");
#else
      return false;
#endif
    case Isa::kAmx:
#if defined(PYEFF_HAVE_AMX) && defined(__linux__)
    {
      if (!machine_has(Isa::kAvx512) || !__builtin_cpu_supports("avx512bf16") ||
          !__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16") ||
          !__builtin_cpu_supports("amx-int8")) {
        return false;
      }
      // Linux hands out the tile registers on request only; without it the first tile
      // instruction is SIGILL.
      constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
      constexpr long kTileData = 18;
      return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }
#else
      return false;
#endif
  }
  return false;
#else
  return isa == Isa::kGeneric;
#endif
}

Isa best_isa() {
  static const Isa best = available_isas().back();
  return best;
}

}  // namespace

Isa isa() {
  const int f = forced.load(std::memory_order_relaxed);
  return f == kNotForced ? best_isa() : static_cast<Isa>(f);
}

void force_isa(Isa isa) {
  if (!machine_has(isa)) {
    std::string names;
    for (const Isa available : available_isas()) {
      names += (names.empty() ? "" : ", ") + std::string(isa_name(available));
    }
    throw std::invalid_argument("isa: name must be an instruction set of this build and machine (" +
                                names + "), got " + isa_name(isa));
  }
  forced.store(static_cast<int>(isa), std::memory_order_relaxed);
}

void unforce_isa() { forced.store(kNotForced, std::memory_order_relaxed); }

bool has_avx512_bf16() {
#if defined(__x86_64__) && defined(__GNUC__) && defined(PYEFF_HAVE_AVX512BF16)
  static const bool has = machine_has(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

std::vector<Isa> available_isas() {
  std::vector<Isa> all;
  for (const Isa candidate : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (machine_has(candidate)) all.push_back(candidate);
  }
  return all;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return "generic";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

Isa isa_from_name(const std::string& name) {
  for (const Isa candidate : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (name == isa_name(candidate)) return candidate;
  }
  throw std::invalid_argument("isa: name must be generic, avx2, avx512 or amx, got " + name);
}

}  // namespace pyeff::cpu
