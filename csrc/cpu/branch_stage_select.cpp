// Prepares a call and chooses the object file of the instruction set in use. Compiled once;
// branch_stage.cpp is compiled once per instruction set.

#include "cpu/branch_stage_kernels.h"
#include "cpu/isa.h"

namespace pyeff::cpu {
namespace {

// isa() names nothing that was not compiled in.
const BranchStageKernels& kernels() {
  switch (isa()) {
#ifdef PYEFF_HAVE_AMX
    case Isa::kAmx:
      return amx::branch_stage_kernels;
#endif
#ifdef PYEFF_HAVE_AVX512
    case Isa::kAvx512:
      return avx512::branch_stage_kernels;
#endif
#ifdef PYEFF_HAVE_AVX2
    case Isa::kAvx2:
      return avx2::branch_stage_kernels;
#endif
    default:
      return generic::branch_stage_kernels;
  }
}

StageArguments arguments_of(const StageProgram& program, const TensorView& x) {
  const int last = x.ndim - 1;
  const bool wide = x.dtype == Dtype::kFloat64;
  const bool as_computed = wide || x.dtype == Dtype::kFloat32;
  StageArguments arguments{};
  arguments.element_size = wide ? 8 : 4;
  arguments.input_in_place = arguments.output_in_place = as_computed;
  if (program.vector) {
    arguments.rows = arguments.cols = 1;
    arguments.in_pixel = arguments.in_row = x.shape[last];
  } else {
    arguments.rows = x.shape[last - 1];
    arguments.cols = x.shape[last];
    arguments.in_row = x.stride[last - 1];
    arguments.in_pixel = x.stride[last];
  }
  return arguments;
}

// Pairs in the order of their branches, so that a branch's parameters stay in the cache; within a
// branch in theirs.
std::vector<std::int64_t> by_branch(const std::int32_t* index, std::int64_t pairs,
                                    std::int64_t branches) {
  std::vector<std::int64_t> next(static_cast<std::size_t>(branches) + 1, 0), order(pairs);
  for (std::int64_t i = 0; i < pairs; ++i) ++next[index[i] + 1];
  for (std::int64_t b = 0; b < branches; ++b) next[b + 1] += next[b];
  for (std::int64_t i = 0; i < pairs; ++i) order[next[index[i]]++] = i;
  return order;
}

// Starting threads costs about as much as this many multiply-adds.
int useful_threads(int threads, double multiply_adds, std::int64_t pairs) {
  constexpr double kWorthThreads = 2.5e6;
  if (multiply_adds < kWorthThreads) return 1;
  return pairs < threads ? static_cast<int>(pairs) : threads;
}

}  // namespace

std::int64_t branch_stage_packed_elements(const StageProgram& program) {
  std::vector<StageParameters> places;
  return program.branches * place_parameters(program, places);
}

void branch_stage_pack(const StageProgram& program, const std::vector<TensorView>& tensors,
                       const TensorView& packed, int threads) {
  std::vector<StageParameters> places;
  StagePacking packing{};
  packing.branch_elements = place_parameters(program, places);
  if (packing.branch_elements == 0) return;
  packing.steps = program.steps.data();
  packing.step_count = static_cast<std::int64_t>(program.steps.size());
  packing.parameters = places.data();
  packing.branches = program.branches;
  packing.tensors = tensors.data();
  packing.packed = packed;
  packing.threads = useful_threads(
      threads, double(packing.branches) * double(packing.branch_elements), packing.branches);
  kernels().pack(packing);
}

void branch_stage_forward(const StageProgram& program, const TensorView& x, const TensorView& index,
                          const TensorView& packed, const TensorView& y, int threads) {
  std::vector<StageParameters> places;
  StageRun run{};
  run.branch_elements = place_parameters(program, places);
  const StageLayout layout = lay_out(program, arguments_of(program, x));
  run.k = index.shape[1];
  run.pairs = index.shape[0] * run.k;
  if (run.pairs == 0) return;
  run.steps = program.steps.data();
  run.step_count = static_cast<std::int64_t>(program.steps.size());
  run.sources = program.sources.data();
  run.parameters = places.data();
  run.maps = layout.maps.data();
  run.output = program.output;
  run.scratch = layout.scratch;
  run.taps = layout.taps;
  run.x = x;
  run.y = y;
  run.packed = packed;
  run.x_per_pair = x.ndim == (program.vector ? 3 : 5);
  run.index = index.as<const std::int32_t>();
  run.threads = useful_threads(threads, double(run.pairs) * layout.multiply_adds, run.pairs);

  // The branches of an image share its padded copy, the images of a branch its parameters: what is
  // larger stays in the cache.
  const StageMap& input = layout.maps[0];
  const bool copies = input.place == StageMap::kScratch && !run.x_per_pair;
  const std::int64_t copied = copies ? 2 * input.rows * input.row : 0;
  std::vector<std::int64_t> order;
  constexpr std::int64_t kChunks = 8;  // of each thread, so that none waits long for the last
  run.chunk = run.pairs / (kChunks * run.threads);
  if (run.branch_elements > copied) {
    order = by_branch(run.index, run.pairs, program.branches);
    run.order = order.data();
  } else {
    run.chunk = (run.chunk + run.k - 1) / run.k * run.k;
  }
  if (run.chunk < 1) run.chunk = 1;
  kernels().forward(run);
}

}  // namespace pyeff::cpu
