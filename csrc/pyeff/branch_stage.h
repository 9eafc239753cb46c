#pragma once
// branch_stage: a whole branch for every (image, branch) pair in one call, for inference.
// Mullapudi et al., "HydraNets: Specialized Dynamic Architectures for Efficient Inference",
// CVPR 2018.
//
//   x [N, C, H, W], shared by the k branches of an image, or [N, k, C, H, W]; of a program of
//   vectors [N, F] or [N, k, F].   index [N, k], int32   y [N, k, C', H', W'] or [N, k, F']
// A branch is a list of steps over slots: slot 0 is its input, slot i + 1 the result of step i,
//   activation(kind(sources) + slot residual).

#include <vector>

#include "pyeff/activation.h"
#include "pyeff/tensor_view.h"

namespace pyeff {

// In the order of pyeff/ops/_branch_steps.py.
enum class StageKind {
  kConv2d,
  kLinear,
  kScaleShift,
  kActivation,
  kAdd,
  kPool2d,
  kAdaptivePool2d,
  kFlatten,
  kConcat
};

struct StageStep {
  StageKind kind;
  Activation activation;
  int residual;                    // slot, or -1
  int first_source, source_count;  // in StageProgram::sources
  int tensors[2];                  // numbers of the parameters, -1 where there is none
  // Convolution, linear step (a 1 x 1 convolution) and pooling; rows_in is the channels of a group
  // that are summed, groups = rows_in = 1 of a pooling step.
  std::int64_t out, rows_in, groups;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w;
  std::int64_t top, bottom, left, right;
  std::int64_t dilation_h, dilation_w;
  bool average, ceil_mode, count_include_pad;  // pooling
  std::int64_t bins_h, bins_w;                 // adaptive pooling
};

// Of a vector rows = cols = 1.
struct StageShape {
  std::int64_t channels, rows, cols;
  bool vector;
};

struct StageProgram {
  std::int64_t branches, in_channels;
  bool vector;  // slot 0 is a vector
  int output;   // slot
  int tensor_count;
  std::vector<StageStep> steps;
  std::vector<int> sources;
};

// Reads the integers that pyeff/ops/_branch_steps.py encodes. Whatever they are, a program that is
// returned reads only slots that were written before. Throws std::invalid_argument.
StageProgram parse_stage_program(const std::vector<std::int64_t>& integers);

// The shape of every slot; throws std::invalid_argument where the input does not fit the steps.
std::vector<StageShape> stage_shapes(const StageProgram& program, std::int64_t rows,
                                     std::int64_t cols);

namespace cpu {

// The parameters of a branch lie one after the other in the order of the steps, in the form of
// cpu/branch_stage_layout.h; the branches follow each other. float32 for all parameters but
// float64, which stay float64.
std::int64_t branch_stage_packed_elements(const StageProgram& program);

// The parameters are [B, ...] with any strides, in the shapes of the program.
void branch_stage_pack(const StageProgram& program, const std::vector<TensorView>& tensors,
                       const TensorView& packed, int threads);

void branch_stage_forward(const StageProgram& program, const TensorView& x, const TensorView& index,
                          const TensorView& packed, const TensorView& y, int threads);

}  // namespace cpu

namespace cuda {

// The parameters of a branch as pyeff/ops/_branch_stage_cuda.py arranges them, in the form of
// cuda/branch_stage_layout.h: weights [B, ...] in the dtype of x, and vectors [B, ...] (biases,
// scales and shifts), float32, or float64 for a float64 x.
struct StageParameterSizes {
  std::int64_t weights, vectors;  // of a branch, in elements
};
StageParameterSizes branch_stage_parameter_sizes(const StageProgram& program, Dtype dtype);

// Bytes of shared memory that a block needs, or -1 where the program has too many steps.
std::int64_t branch_stage_shared_bytes(const StageProgram& program, std::int64_t rows,
                                       std::int64_t cols, Dtype dtype);

// The most that a block of the device can have.
std::int64_t branch_stage_most_shared_bytes(int device_index);

// Routes to no branch give zeros. branch_stage_shared_bytes must be what a block of the device can
// have.
void branch_stage_forward(const StageProgram& program, const TensorView& x, const TensorView& index,
                          const TensorView& weights, const TensorView& vectors, const TensorView& y,
                          void* stream);

}  // namespace cuda
}  // namespace pyeff
