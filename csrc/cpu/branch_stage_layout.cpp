#include "cpu/branch_stage_layout.h"

#include <algorithm>

#include "pyeff/stage_arena.h"

namespace pyeff::cpu {
namespace {

constexpr const char* kOp = "branch_stage";

std::int64_t checked_product(std::initializer_list<std::int64_t> factors) {
  constexpr double kMostElements = 1e15;
  double product = 1;
  std::int64_t exact = 1;
  for (const std::int64_t factor : factors) {
    product *= static_cast<double>(factor);
    if (product > kMostElements) fail(kOp, "plan must have a size that fits into memory");
    exact *= factor;
  }
  return exact;
}

// Lanes that are written of a pixel: whole vectors, those of the last group past its channels.
std::int64_t written_lanes(const StageStep& step, std::int64_t channels) {
  const bool grouped = step.kind == StageKind::kConv2d && step.groups > 1 && !is_depthwise(step);
  if (!grouped) return padded_lanes(channels);
  const std::int64_t last = step.out - step.out / step.groups;
  return padded_lanes(last + group_lanes(step));
}

// Pixels a multiple of half a page apart fall into the same few sets of the first-level cache.
std::int64_t apart(std::int64_t pixel, std::int64_t element_size) {
  constexpr std::int64_t kHalfPage = 2048;
  return pixel * element_size % kHalfPage == 0 ? pixel + kNarrow : pixel;
}

// Grows the zeros around the source of a convolution to what it reads.
void surround(StageMap& source, const StageStep& step, const StageShape& result) {
  const auto beyond = [](std::int64_t positions, std::int64_t stride, std::int64_t kernel,
                         std::int64_t dilation, std::int64_t before, std::int64_t size) {
    return (positions - 1) * stride + (kernel - 1) * dilation - before - (size - 1);
  };
  source.top = std::max(source.top, step.top);
  source.left = std::max(source.left, step.left);
  source.bottom = std::max(source.bottom, beyond(result.rows, step.stride_h, step.kernel_h,
                                                 step.dilation_h, step.top, source.rows));
  source.right = std::max(source.right, beyond(result.cols, step.stride_w, step.kernel_w,
                                               step.dilation_w, step.left, source.cols));
}

bool surrounded(const StageMap& map) { return map.top + map.bottom + map.left + map.right > 0; }

void choose_places(const StageProgram& program, const StageArguments& arguments,
                   std::vector<StageMap>& maps) {
  StageMap& input = maps[0];
  // Whole vectors are read, which must not lie past the end of x.
  bool whole = input.channels % kNarrow == 0;
  for (const StageStep& step : program.steps) {
    if (step.residual == 0 && written_lanes(step, step.out) != step.out) whole = false;
  }
  if (arguments.input_in_place && whole && !surrounded(input)) {
    input.place = StageMap::kInput;
    input.pixel = arguments.in_pixel;
    input.row = arguments.in_row;
  }
  StageMap& output = maps[program.output];
  if (arguments.output_in_place && output.channels == output.pixel && !surrounded(output)) {
    output.place = StageMap::kOutput;
  }
}

}  // namespace

std::int64_t place_parameters(const StageProgram& program, std::vector<StageParameters>& places) {
  std::int64_t at = 0;
  places.clear();
  for (const StageStep& step : program.steps) {
    std::int64_t weights = 0, biases = 0;
    if (step.kind == StageKind::kScaleShift || is_depthwise(step)) {
      biases = padded_lanes(step.out);
      weights = checked_product({taps_of(step), biases});
    } else if (step.kind == StageKind::kConv2d || step.kind == StageKind::kLinear) {
      biases = checked_product({step.groups, group_lanes(step)});
      weights = checked_product(
          {step.groups, step.kernel_h, step.kernel_w, step.rows_in, group_lanes(step)});
    }
    places.push_back({at, at + weights});
    at += weights + biases;
    checked_product({program.branches, std::max<std::int64_t>(at, 1)});
  }
  return at;
}

StageLayout lay_out(const StageProgram& program, const StageArguments& arguments) {
  const std::vector<StageShape> shapes = stage_shapes(program, arguments.rows, arguments.cols);
  StageLayout layout{};
  for (const StageShape& shape : shapes) {
    StageMap map{};
    map.channels = shape.channels;
    map.rows = shape.rows;
    map.cols = shape.cols;
    map.pixel = padded_lanes(shape.channels);
    map.place = StageMap::kScratch;
    layout.maps.push_back(map);
  }
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    const StageStep& step = program.steps[i];
    StageMap& result = layout.maps[i + 1];
    result.pixel = written_lanes(step, result.channels);
    const bool summed = step.kind == StageKind::kConv2d || step.kind == StageKind::kLinear;
    if (!summed) continue;
    if (step.kind == StageKind::kConv2d) {
      surround(layout.maps[program.sources[step.first_source]], step, shapes[i + 1]);
    }
    layout.taps = std::max(layout.taps, taps_of(step));
    layout.multiply_adds += double(shapes[i + 1].rows * shapes[i + 1].cols) *
                            double(step.out * step.rows_in * taps_of(step));
  }
  choose_places(program, arguments, layout.maps);
  std::vector<int> last = last_uses(program);
  last[0] = static_cast<int>(program.steps.size());  // the next branch reads the input too
  StageArena arena;
  for (std::size_t slot = 0; slot < layout.maps.size(); ++slot) {
    StageMap& map = layout.maps[slot];
    if (map.place == StageMap::kInput) continue;
    if (map.place == StageMap::kOutput) {
      map.row = map.cols * map.pixel;
      continue;
    }
    map.pixel = apart(map.pixel, arguments.element_size);
    map.row = (map.left + map.cols + map.right) * map.pixel;
    const std::int64_t elements = checked_product(
        {map.top + map.rows + map.bottom, map.left + map.cols + map.right, map.pixel});
    map.offset = arena.take(elements, static_cast<int>(slot), last[slot]);
  }
  layout.scratch = arena.size() + kPanel;  // vectors are read past the end of a grouped residual
  return layout;
}

}  // namespace pyeff::cpu
