#pragma once
// Where everything of a branch stage lies: the packed parameters of a branch, and the maps between
// its steps in a thread's scratch. Decided once a call, the same for every instruction set.
//   dense        [groups][panels][kh * kw][rows][width], then [groups][lanes]    (weights, biases)
//   depth-wise   [kh * kw][lanes], then [lanes]
//   scale, shift [lanes], then [lanes]
// Lanes are the output channels of a group and what fills them up to a multiple of kNarrow, zero.
// Panels are kPanel lanes wide, the last one kNarrow where that suffices.
// Functions are static: objects of different instruction sets must not share code.

#include <vector>

#include "cpu/packed_layout.h"
#include "pyeff/branch_stage.h"

namespace pyeff::cpu {

static inline bool is_depthwise(const StageStep& step) {
  return step.kind == StageKind::kConv2d && step.groups > 1 && step.rows_in == 1 &&
         step.out == step.groups;
}
static inline std::int64_t taps_of(const StageStep& step) { return step.kernel_h * step.kernel_w; }

// Elements of the weights of one group, and of its biases.
static inline std::int64_t group_lanes(const StageStep& step) {
  return padded_lanes(step.out / step.groups);
}
static inline std::int64_t group_weights(const StageStep& step) {
  return taps_of(step) * step.rows_in * group_lanes(step);
}

// Offsets of a step's parameters within those of a branch.
struct StageParameters {
  std::int64_t weights, biases;  // or scale and shift
};

// Returns the elements of a branch.
std::int64_t place_parameters(const StageProgram& program, std::vector<StageParameters>& places);

// One slot's map with the zeros that convolutions read around it.
struct StageMap {
  enum Place { kInput, kScratch, kOutput };

  std::int64_t channels, rows, cols;
  std::int64_t pixel, row;  // strides; at least the lanes that are written of a pixel
  std::int64_t top, bottom, left, right;
  std::int64_t offset;  // of the first zero, in the scratch
  Place place;

  static constexpr std::int64_t kNone = -1;
};

struct StageLayout {
  std::vector<StageMap> maps;
  std::int64_t scratch;  // elements
  std::int64_t taps;     // of the largest kernel
  double multiply_adds;  // of one pair
};

// What the kernel may do with the memory of its arguments.
struct StageArguments {
  std::int64_t rows, cols;
  std::int64_t element_size;      // of the maps
  bool input_in_place;            // x is of the maps' type and has its channels side by side
  std::int64_t in_row, in_pixel;  // strides of x
  bool output_in_place;           // y is of the maps' type
};

StageLayout lay_out(const StageProgram& program, const StageArguments& arguments);

}  // namespace pyeff::cpu
