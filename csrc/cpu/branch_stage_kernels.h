#pragma once
// What every instruction set provides for branch_stage. Plain data only: objects of different
// instruction sets must not share code.

#include "cpu/branch_stage_layout.h"

namespace pyeff::cpu {

// One call, prepared once for all instruction sets.
struct StageRun {
  const StageStep* steps;
  std::int64_t step_count;
  const int* sources;
  const StageParameters* parameters;  // of each step
  std::int64_t branch_elements;
  const StageMap* maps;  // of each slot
  int output;
  std::int64_t scratch, taps;

  TensorView x, y, packed;
  bool x_per_pair;
  const std::int32_t* index;  // [N * k]
  const std::int64_t* order;  // of the N * k pairs, or null for theirs
  std::int64_t pairs, k;
  std::int64_t chunk;  // pairs that a thread takes at a time
  int threads;
};

struct StagePacking {
  const StageStep* steps;
  std::int64_t step_count;
  const StageParameters* parameters;
  std::int64_t branches, branch_elements;
  const TensorView* tensors;
  TensorView packed;
  int threads;
};

struct BranchStageKernels {
  void (*pack)(const StagePacking& packing);
  void (*forward)(const StageRun& run);
};

namespace generic {
extern const BranchStageKernels branch_stage_kernels;
}
namespace avx2 {
extern const BranchStageKernels branch_stage_kernels;
}
namespace avx512 {
extern const BranchStageKernels branch_stage_kernels;
}
namespace amx {
extern const BranchStageKernels branch_stage_kernels;
}

}  // namespace pyeff::cpu
