// Where the maps and the parameters of a branch lie; host code alone.

#include "cuda/branch_stage_layout.h"

#include <algorithm>

#include "pyeff/stage_arena.h"

namespace pyeff::cuda {
namespace {

// More than any device has; below it every number of a program fits into an int.
constexpr double kMostElements = 1 << 20;

constexpr std::int64_t filled_up(std::int64_t count, std::int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

bool is_half(Dtype dtype) { return dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16; }

std::int64_t bytes_of(Dtype dtype) {
  if (is_half(dtype)) return 2;
  return dtype == Dtype::kFloat32 ? 4 : 8;
}

bool is_summed(const StageStep& step) {
  return step.kind == StageKind::kConv2d || step.kind == StageKind::kLinear;
}

struct Map {
  std::int64_t top = 0, bottom = 0, left = 0, right = 0;
};

// Grows the zeros around the source of a convolution to what it reads.
void surround(Map& around, const StageStep& step, const StageShape& source,
              const StageShape& result) {
  const auto beyond = [](std::int64_t positions, std::int64_t stride, std::int64_t kernel,
                         std::int64_t dilation, std::int64_t before, std::int64_t size) {
    return (positions - 1) * stride + (kernel - 1) * dilation - before - (size - 1);
  };
  around.top = std::max(around.top, step.top);
  around.left = std::max(around.left, step.left);
  around.bottom = std::max(around.bottom, beyond(result.rows, step.stride_h, step.kernel_h,
                                                 step.dilation_h, step.top, source.rows));
  around.right = std::max(around.right, beyond(result.cols, step.stride_w, step.kernel_w,
                                               step.dilation_w, step.left, source.cols));
}

// Elements from one pixel to the next. The eight rows of a matrix that ldmatrix reads, and the
// pixels of neighbouring threads, then lie in different banks.
std::int64_t pixel_stride(std::int64_t channels, Dtype dtype) {
  if (is_half(dtype)) return filled_up(channels, kMatrixDepth) + kMatrixLanes;
  return channels | 1;
}

// Returns the elements of the slot's place, or -1 if they are more than any block can have.
std::int64_t place(const StageShape& shape, const Map& around, Dtype dtype, StageSlot& slot) {
  const std::int64_t rows = around.top + shape.rows + around.bottom;
  const std::int64_t cols = around.left + shape.cols + around.right;
  const std::int64_t pixel = pixel_stride(shape.channels, dtype);
  if (double(rows) * double(cols) * double(pixel) > kMostElements) return -1;
  slot.channels = static_cast<int>(shape.channels);
  slot.rows = static_cast<int>(shape.rows);
  slot.cols = static_cast<int>(shape.cols);
  slot.pixel = static_cast<int>(pixel);
  slot.row = static_cast<int>(cols * pixel);
  slot.top = static_cast<int>(around.top);
  slot.left = static_cast<int>(around.left);
  slot.all_rows = static_cast<int>(rows);
  slot.all_cols = static_cast<int>(cols);
  return rows * cols * pixel;
}

StageOp op_of(const StageStep& step, Dtype dtype) {
  switch (step.kind) {
    case StageKind::kConv2d:
    case StageKind::kLinear:
      return is_matrix_step(step, dtype) ? StageOp::kMatrixConv : StageOp::kDirectConv;
    case StageKind::kScaleShift:
      return StageOp::kScaleShift;
    case StageKind::kAdd:
      return StageOp::kAdd;
    case StageKind::kPool2d:
    case StageKind::kAdaptivePool2d:
      return StageOp::kPool;
    case StageKind::kFlatten:
      return StageOp::kFlatten;
    default:
      return StageOp::kCopy;
  }
}

StageTask task_of(const StageStep& step, int result, const int* sources, Dtype dtype) {
  StageTask task{};
  task.op = op_of(step, dtype);
  task.activation = step.activation;
  task.source = sources[0];
  task.second = step.kind == StageKind::kAdd ? sources[1] : step.residual;
  task.result = result;
  task.fresh = true;
  task.average = step.average;
  task.count_include_pad = step.count_include_pad;
  task.adaptive = step.kind == StageKind::kAdaptivePool2d;
  const auto narrow = [](std::int64_t value) { return static_cast<int>(value); };
  task.rows_in = narrow(step.rows_in);
  task.groups = narrow(step.groups);
  task.kernel_h = narrow(step.kernel_h);
  task.kernel_w = narrow(step.kernel_w);
  task.stride_h = narrow(step.stride_h);
  task.stride_w = narrow(step.stride_w);
  task.dilation_h = narrow(step.dilation_h);
  task.dilation_w = narrow(step.dilation_w);
  task.top = narrow(step.top);
  task.bottom = narrow(step.bottom);
  task.left = narrow(step.left);
  task.right = narrow(step.right);
  return task;
}

// False if there are more tasks than the kernel takes. A concatenation is one of each part.
bool list_tasks(const StageProgram& program, Dtype dtype, StageTasks& tasks) {
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    const StageStep& step = program.steps[i];
    const int* sources = program.sources.data() + step.first_source;
    const int parts = step.kind == StageKind::kConcat ? step.source_count : 1;
    int channel = 0;
    for (int part = 0; part < parts; ++part) {
      if (tasks.task_count == kMostStageSteps) return false;
      StageTask& task = tasks.tasks[tasks.task_count++];
      task = task_of(step, static_cast<int>(i) + 1, sources + part, dtype);
      task.first_channel = channel;
      task.fresh = part == 0;
      task.weights = tasks.weights;
      task.vectors = tasks.vectors;
      channel += tasks.slots[sources[part]].channels;
    }
    const StageParameterSizes sizes = stage_step_sizes(step, dtype);
    tasks.weights += sizes.weights;
    tasks.vectors += sizes.vectors;
  }
  return true;
}

}  // namespace

bool is_matrix_step(const StageStep& step, Dtype dtype) {
  return is_half(dtype) && is_summed(step) && step.groups == 1;
}

StageParameterSizes stage_step_sizes(const StageStep& step, Dtype dtype) {
  if (step.kind == StageKind::kScaleShift) return {0, 2 * filled_up(step.out, kMatrixLanes)};
  if (!is_summed(step)) return {0, 0};
  const std::int64_t taps = step.kernel_h * step.kernel_w;
  const std::int64_t weights =
      is_matrix_step(step, dtype)
          ? filled_up(step.out, kMatrixLanes) * taps * filled_up(step.rows_in, kMatrixDepth)
          : taps * step.rows_in * filled_up(step.out, kDirectLanes);
  return {weights, filled_up(step.out, kMatrixLanes)};
}

StageParameterSizes branch_stage_parameter_sizes(const StageProgram& program, Dtype dtype) {
  StageParameterSizes total{0, 0};
  for (const StageStep& step : program.steps) {
    const double kernel = double(step.kernel_h) * double(step.kernel_w);
    if (kernel * double(step.rows_in + 16) * double(step.out + 8) > 1e15) {
      fail("branch_stage", "plan must have a size that fits into memory");
    }
    const StageParameterSizes sizes = stage_step_sizes(step, dtype);
    total.weights += sizes.weights;
    total.vectors += sizes.vectors;
  }
  return total;
}

std::int64_t lay_out_stage(const StageProgram& program, std::int64_t rows, std::int64_t cols,
                           Dtype dtype, StageTasks& tasks) {
  if (program.steps.size() > kMostStageSteps) return -1;
  const std::vector<StageShape> shapes = stage_shapes(program, rows, cols);
  std::vector<Map> around(shapes.size());
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    const StageStep& step = program.steps[i];
    const int source = program.sources[step.first_source];
    if (step.kind == StageKind::kConv2d) {
      surround(around[source], step, shapes[source], shapes[i + 1]);
    }
  }
  tasks = {};
  tasks.slot_count = static_cast<int>(shapes.size());
  tasks.output = program.output;
  tasks.branches = program.branches;
  const std::vector<int> last = last_uses(program);
  StageArena arena;
  for (std::size_t s = 0; s < shapes.size(); ++s) {
    StageSlot& slot = tasks.slots[s];
    const std::int64_t elements = place(shapes[s], around[s], dtype, slot);
    if (elements < 0) return -1;
    // Matrices are read from multiples of 16 bytes on.
    const std::int64_t at = arena.take(filled_up(elements, 8), static_cast<int>(s), last[s]);
    if (arena.size() > kMostElements) return -1;
    slot.base = static_cast<int>(at) + slot.top * slot.row + slot.left * slot.pixel;
  }
  if (!list_tasks(program, dtype, tasks)) return -1;
  tasks.elements = static_cast<int>(arena.size());
  return arena.size() * bytes_of(dtype);
}

std::int64_t branch_stage_shared_bytes(const StageProgram& program, std::int64_t rows,
                                       std::int64_t cols, Dtype dtype) {
  StageTasks tasks;
  return lay_out_stage(program, rows, cols, dtype, tasks);
}

}  // namespace pyeff::cuda
