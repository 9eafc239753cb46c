#include "pyeff/branch_stage.h"

#include <limits>

namespace pyeff {
namespace {

constexpr const char* kOp = "branch_stage";
constexpr std::int64_t kFormat = 1;
// Of any number in a program: slots and numbers of tensors are ints, and so is one more.
constexpr std::int64_t kLargest = std::numeric_limits<int>::max() - 1;

class Reader {
 public:
  explicit Reader(const std::vector<std::int64_t>& integers) : integers_(integers) {}

  std::int64_t next(std::int64_t lowest, std::int64_t highest) {
    if (at_ == integers_.size()) fail(kOp, "program must be longer");
    const std::int64_t value = integers_[at_++];
    if (value < lowest || value > highest) {
      fail(kOp, "program must have a number from " + std::to_string(lowest) + " to " +
                    std::to_string(highest) + " at " + std::to_string(at_ - 1) + ", got " +
                    std::to_string(value));
    }
    return value;
  }
  std::int64_t positive() { return next(1, kLargest); }
  std::int64_t natural() { return next(0, kLargest); }
  bool flag() { return next(0, 1) == 1; }
  int slot(int count) { return static_cast<int>(next(0, count - 1)); }
  bool at_end() const { return at_ == integers_.size(); }

 private:
  const std::vector<std::int64_t>& integers_;
  std::size_t at_ = 0;
};

void read_window(Reader& reader, StageStep& step) {
  step.kernel_h = reader.positive();
  step.kernel_w = reader.positive();
  step.stride_h = reader.positive();
  step.stride_w = reader.positive();
}

void read_options(Reader& reader, StageStep& step) {
  step.groups = step.rows_in = 1;
  step.kernel_h = step.kernel_w = step.stride_h = step.stride_w = 1;
  step.dilation_h = step.dilation_w = 1;
  switch (step.kind) {
    case StageKind::kConv2d:
      step.out = reader.positive();
      read_window(reader, step);
      step.top = reader.natural();
      step.bottom = reader.natural();
      step.left = reader.natural();
      step.right = reader.natural();
      step.dilation_h = reader.positive();
      step.dilation_w = reader.positive();
      step.groups = reader.positive();
      return;
    case StageKind::kLinear:
      step.out = reader.positive();
      step.rows_in = reader.positive();
      return;
    case StageKind::kScaleShift:
      step.out = reader.positive();
      return;
    case StageKind::kPool2d:
      step.average = reader.flag();
      read_window(reader, step);
      step.top = step.bottom = reader.natural();
      step.left = step.right = reader.natural();
      step.dilation_h = reader.positive();
      step.dilation_w = reader.positive();
      step.ceil_mode = reader.flag();
      step.count_include_pad = reader.flag();
      if (2 * step.top > step.kernel_h || 2 * step.left > step.kernel_w) {
        fail(kOp, "program must pad by at most half of a pooling kernel");
      }
      return;
    case StageKind::kAdaptivePool2d:
      step.average = reader.flag();
      step.bins_h = reader.positive();
      step.bins_w = reader.positive();
      return;
    default:
      return;
  }
}

int tensors_of(StageKind kind) {
  const bool has =
      kind == StageKind::kConv2d || kind == StageKind::kLinear || kind == StageKind::kScaleShift;
  return has ? 2 : 0;
}

void check_sources(const StageStep& step) {
  const int wanted = step.kind == StageKind::kAdd ? 2 : 1;
  if (step.kind == StageKind::kConcat ? step.source_count < 1 : step.source_count != wanted) {
    fail(kOp, "program must give every step its number of sources");
  }
  const bool takes_residual = step.kind == StageKind::kConv2d || step.kind == StageKind::kLinear;
  if (step.residual >= 0 && !takes_residual) {
    fail(kOp, "program must give residuals to convolutions and linear steps only");
  }
}

StageStep read_step(Reader& reader, StageProgram& program) {
  const int slots = static_cast<int>(program.steps.size()) + 1;
  StageStep step{};
  step.kind = static_cast<StageKind>(reader.next(0, static_cast<int>(StageKind::kConcat)));
  step.activation =
      static_cast<Activation>(reader.next(0, static_cast<int>(Activation::kHardswish)));
  step.residual = static_cast<int>(reader.next(-1, slots - 1));
  step.first_source = static_cast<int>(program.sources.size());
  step.source_count = static_cast<int>(reader.next(1, kLargest));
  for (int i = 0; i < step.source_count; ++i) program.sources.push_back(reader.slot(slots));
  read_options(reader, step);
  check_sources(step);
  step.tensors[0] = step.tensors[1] = -1;
  const int count = static_cast<int>(reader.next(tensors_of(step.kind), tensors_of(step.kind)));
  for (int i = 0; i < count; ++i) {
    const bool may_be_missing = i == 1 && step.kind != StageKind::kScaleShift;
    step.tensors[i] = static_cast<int>(reader.next(may_be_missing ? -1 : 0, kLargest));
    if (step.tensors[i] >= program.tensor_count) program.tensor_count = step.tensors[i] + 1;
  }
  return step;
}

std::int64_t positions(std::int64_t size, std::int64_t kernel, std::int64_t stride,
                       std::int64_t before, std::int64_t after, std::int64_t dilation, bool ceil) {
  const std::int64_t room = size + before + after - dilation * (kernel - 1) - 1;
  if (room < 0 && !(ceil && room + stride - 1 >= 0)) {
    fail(kOp, "x must be large enough for the kernel of every step");
  }
  std::int64_t count = (room + (ceil ? stride - 1 : 0)) / stride + 1;
  if (ceil && (count - 1) * stride >= size + before) --count;
  return count;
}

StageShape windowed(const StageStep& step, const StageShape& source, std::int64_t channels) {
  return {channels,
          positions(source.rows, step.kernel_h, step.stride_h, step.top, step.bottom,
                    step.dilation_h, step.ceil_mode),
          positions(source.cols, step.kernel_w, step.stride_w, step.left, step.right,
                    step.dilation_w, step.ceil_mode),
          false};
}

bool same_size(const StageShape& a, const StageShape& b) {
  return a.rows == b.rows && a.cols == b.cols && a.vector == b.vector;
}

StageShape concatenated(const StageProgram& program, const StageStep& step,
                        const std::vector<StageShape>& shapes) {
  StageShape total = shapes[program.sources[step.first_source]];
  for (int i = 1; i < step.source_count; ++i) {
    const StageShape& other = shapes[program.sources[step.first_source + i]];
    if (!same_size(total, other)) fail(kOp, "x must give maps of one size to be concatenated");
    total.channels += other.channels;
  }
  return total;
}

StageShape result_shape(const StageProgram& program, const StageStep& step,
                        const std::vector<StageShape>& shapes) {
  const StageShape& source = shapes[program.sources[step.first_source]];
  const bool needs_map = step.kind == StageKind::kConv2d || step.kind == StageKind::kPool2d ||
                         step.kind == StageKind::kAdaptivePool2d;
  if (needs_map && source.vector) fail(kOp, "program must give convolutions and pooling a map");
  switch (step.kind) {
    case StageKind::kConv2d:
      return windowed(step, source, step.out);
    case StageKind::kLinear:
      if (!source.vector || source.channels != step.rows_in) {
        fail(kOp, "x must give linear steps their " + std::to_string(step.rows_in) + " features");
      }
      return {step.out, 1, 1, true};
    case StageKind::kPool2d:
      return windowed(step, source, source.channels);
    case StageKind::kAdaptivePool2d:
      return {source.channels, step.bins_h, step.bins_w, false};
    case StageKind::kFlatten:
      return {source.channels * source.rows * source.cols, 1, 1, true};
    case StageKind::kConcat:
      return concatenated(program, step, shapes);
    default:
      return source;
  }
}

}  // namespace

StageProgram parse_stage_program(const std::vector<std::int64_t>& integers) {
  constexpr int kHeader = 4;
  Reader reader(integers);
  StageProgram program{};
  reader.next(kFormat, kFormat);
  reader.next(kHeader, kHeader);
  program.branches = reader.positive();
  program.in_channels = reader.positive();
  program.vector = reader.flag();
  program.output = static_cast<int>(reader.positive());
  const std::int64_t steps = reader.positive();
  for (std::int64_t i = 0; i < steps; ++i) program.steps.push_back(read_step(reader, program));
  if (program.output > steps || !reader.at_end()) fail(kOp, "program must end after its steps");
  // How many channels a convolution sums follows from the slots and not from the program. Channels
  // of maps do not depend on the size of the input; vectors have none to sum.
  std::vector<StageShape> shapes{{program.in_channels, 1, 1, program.vector}};
  for (StageStep& step : program.steps) {
    const StageShape& source = shapes[program.sources[step.first_source]];
    StageShape result{source.channels, 1, 1, source.vector};
    if (step.kind == StageKind::kConv2d) {
      if (source.channels % step.groups != 0 || step.out % step.groups != 0) {
        fail(kOp, "program must have groups that divide the channels");
      }
      step.rows_in = source.channels / step.groups;
      result.channels = step.out;
    } else if (step.kind == StageKind::kLinear) {
      result = {step.out, 1, 1, true};
    } else if (step.kind == StageKind::kFlatten) {
      result.vector = true;
    } else if (step.kind == StageKind::kConcat) {
      result = concatenated(program, step, shapes);
    }
    shapes.push_back(result);
  }
  return program;
}

std::vector<StageShape> stage_shapes(const StageProgram& program, std::int64_t rows,
                                     std::int64_t cols) {
  std::vector<StageShape> shapes{{program.in_channels, rows, cols, program.vector}};
  for (const StageStep& step : program.steps) {
    const StageShape result = result_shape(program, step, shapes);
    const auto fits = [&](int slot) {
      return same_size(shapes[slot], result) && shapes[slot].channels == result.channels;
    };
    const bool added = step.kind == StageKind::kAdd;
    if ((step.residual >= 0 && !fits(step.residual)) ||
        (added && !fits(program.sources[step.first_source + 1]))) {
      fail(kOp, "x must give maps of one size to be added");
    }
    if (step.kind == StageKind::kScaleShift && result.channels != step.out) {
      fail(kOp, "x must give " + std::to_string(step.out) + " features to be scaled");
    }
    shapes.push_back(result);
  }
  return shapes;
}

}  // namespace pyeff
