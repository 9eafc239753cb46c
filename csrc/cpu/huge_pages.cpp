#include "cpu/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pyeff::cpu {
namespace {

constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
constexpr std::uintptr_t kWorth = std::uintptr_t{4} << 20;

std::uintptr_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
      return 2;
    case Dtype::kFloat32:
    case Dtype::kInt32:
      return 4;
    case Dtype::kFloat64:
    case Dtype::kInt64:
      return 8;
  }
  return 0;
}

// From the first byte to behind the last one; strides are not negative.
std::uintptr_t extent(const TensorView& t) {
  std::int64_t last = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] == 0) return 0;
    last += (t.shape[d] - 1) * t.stride[d];
  }
  return (static_cast<std::uintptr_t>(last) + 1) * size_of(t.dtype);
}

}  // namespace

void ask_for_huge_pages(const TensorView& result) {
#ifdef __linux__
  const std::uintptr_t bytes = extent(result);
  if (bytes < kWorth) return;
  const auto address = reinterpret_cast<std::uintptr_t>(result.data);
  // Pages that lie in the result as a whole: what lies beside it is not ours.
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  // It is advice: a system that cannot take it says so, and nothing is lost.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(result);
#endif
}

}  // namespace pyeff::cpu
