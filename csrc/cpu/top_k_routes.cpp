// top_k_routes: a partial sort of each row. Compiled once: there is nothing to vectorise.

#include "pyeff/top_k_routes.h"

#include <algorithm>
#include <cmath>
#include <vector>

#define PYEFF_ISA any_cpu
#include "cpu/nested_conv2d_types.h"

namespace pyeff::cpu {
namespace {

struct Scored {
  double score;
  std::int32_t branch;
};

bool goes_before(const Scored& a, const Scored& b) {
  return a.score > b.score || (a.score == b.score && a.branch < b.branch);
}

template <typename T>
void routes(const TensorView& scores, const TensorView& index) {
  const std::int64_t images = scores.shape[0], branches = scores.shape[1], k = index.shape[1];
  const T* from = scores.as<const T>();
  std::int32_t* to = index.as<std::int32_t>();
  std::vector<Scored> row(static_cast<std::size_t>(branches));
  for (std::int64_t n = 0; n < images; ++n, to += k) {
    for (std::int64_t b = 0; b < branches; ++b) {
      const double score = any_cpu::widen(from[n * scores.stride[0] + b * scores.stride[1]]);
      if (std::isnan(score)) {
        fail("top_k_routes", "scores must hold no NaN, got one for branch " + std::to_string(b) +
                                 " of row " + std::to_string(n));
      }
      row[b] = {score, static_cast<std::int32_t>(b)};
    }
    std::partial_sort(row.begin(), row.begin() + k, row.end(), goes_before);
    for (std::int64_t j = 0; j < k; ++j) to[j] = row[j].branch;
  }
}

}  // namespace

void top_k_routes(const TensorView& scores, const TensorView& index) {
  any_cpu::for_dtype(scores.dtype, [&](auto t) { routes<decltype(t)>(scores, index); });
}

}  // namespace pyeff::cpu
