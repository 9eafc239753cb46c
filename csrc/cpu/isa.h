#pragma once
// Instruction sets of the CPU kernels: one object file each, chosen once at run time.

#include <string>
#include <vector>

namespace pyeff::cpu {

enum class Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The best instruction set that was compiled in and that this machine has every flag of, or the
// one that was forced.
Isa isa();

// Forces an instruction set; throws std::invalid_argument where it is not in available_isas().
void force_isa(Isa isa);
void unforce_isa();

// Whether kernels of kAvx512 may use the dot products of bfloat16, which not all of its machines
// have; a kernel with them is an object file of its own.
bool has_avx512_bf16();

std::vector<Isa> available_isas();
const char* isa_name(Isa isa);
Isa isa_from_name(const std::string& name);

}  // namespace pyeff::cpu
