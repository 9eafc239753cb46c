#pragma once
// A branch as the kernel runs it: a list of steps that is passed to it by value, over maps in the
// shared memory of a block. A map has its channels side by side and zeros around it, as far as the
// convolutions that read it reach; maps share memory where their lives do not overlap.
//
// Weights of a step, in the dtype of the maps, with the channels of a group filled up by zeros:
//   matrix   [ceil(O / 8)][kh * kw][ceil(C / 16)][32 lanes][4], the operand B of mma.m16n8k16: lane
//            l has output l / 4 and the inputs 2 (l % 4) + {0, 1, 8, 9}
//   direct   [kh * kw][C / groups][O filled up to a multiple of 4]
// Vectors: the bias (zeros where there is none), or scale and shift, each filled up to a multiple
// of 8.

#include <cstdint>

#include "pyeff/branch_stage.h"

namespace pyeff::cuda {

inline constexpr int kMostStageSteps = 64;
inline constexpr int kDirectLanes = 4, kMatrixLanes = 8, kMatrixDepth = 16;

enum class StageOp { kMatrixConv, kDirectConv, kScaleShift, kAdd, kCopy, kPool, kFlatten };

// A map in shared memory; strides and offsets in elements. A vector is a map of one pixel.
struct StageSlot {
  int base;  // of the first pixel that is no zero around the map
  int channels, rows, cols;
  int pixel, row;                     // strides
  int top, left, all_rows, all_cols;  // with the zeros around it
};

struct StageTask {
  StageOp op;
  Activation activation;
  int source, result;
  int second;         // slot that is added, or -1
  int first_channel;  // of the result (kCopy)
  bool fresh;         // the first task that writes the result
  bool average, count_include_pad, adaptive;
  int rows_in, groups;
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int top, bottom, left, right;
  std::int64_t weights, vectors;  // offsets within those of a branch
};

struct StageTasks {
  int task_count, slot_count, output;
  int elements;  // of shared memory
  std::int64_t branches, weights, vectors;
  StageTask tasks[kMostStageSteps];
  StageSlot slots[kMostStageSteps + 1];
};

// Of one step; a step without parameters has none.
StageParameterSizes stage_step_sizes(const StageStep& step, Dtype dtype);

// Whether the step is a product of matrices on the tensor cores.
bool is_matrix_step(const StageStep& step, Dtype dtype);

// Writes the tasks and returns the bytes of shared memory; -1 where there are too many steps, or
// where the maps are larger than any shared memory (the tasks are not written then).
std::int64_t lay_out_stage(const StageProgram& program, std::int64_t rows, std::int64_t cols,
                           Dtype dtype, StageTasks& tasks);

}  // namespace pyeff::cuda
