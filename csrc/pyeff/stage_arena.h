#pragma once
// Memory that the maps of a branch share: a place is free again after the last step that reads it.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pyeff/branch_stage.h"

namespace pyeff {

// First free place, among those that were taken before, for steps `from` to `until`.
class StageArena {
 public:
  std::int64_t take(std::int64_t elements, int from, int until) {
    std::int64_t offset = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Taken& t : taken_) {
        const bool together = t.from <= until && from <= t.until;
        if (together && t.begin < offset + elements && offset < t.end) {
          offset = t.end;
          moved = true;
        }
      }
    }
    taken_.push_back({offset, offset + elements, from, until});
    size_ = std::max(size_, offset + elements);
    return offset;
  }
  std::int64_t size() const { return size_; }

 private:
  struct Taken {
    std::int64_t begin, end;
    int from, until;
  };
  std::vector<Taken> taken_;
  std::int64_t size_ = 0;
};

// The last step that reads each slot, counted from 1; the output is read after all of them.
inline std::vector<int> last_uses(const StageProgram& program) {
  std::vector<int> last(program.steps.size() + 1, 0);
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    const StageStep& step = program.steps[i];
    const int now = static_cast<int>(i) + 1;
    for (int s = 0; s < step.source_count; ++s) last[program.sources[step.first_source + s]] = now;
    if (step.residual >= 0) last[step.residual] = now;
    last[now] = now;
  }
  last[program.output] = static_cast<int>(program.steps.size());
  return last;
}

}  // namespace pyeff
