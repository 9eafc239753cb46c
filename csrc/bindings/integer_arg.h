#pragma once
// Python integers as kernels take them: every one of them is checked here, since a kernel that
// multiplies, allocates or starts threads by a number would not survive any number.

#include <algorithm>
#include <limits>
#include <thread>

#include "bindings/tensor_arg.h"
#include "pyeff/conv_window.h"

namespace pyeff::bindings {

// Products of two such numbers, which positions in a map are, fit into 64 bits.
inline constexpr std::int64_t kLargestInteger = std::numeric_limits<std::int32_t>::max();

inline std::int64_t require_integer(const char* op, const char* name, std::int64_t value,
                                    std::int64_t lowest) {
  if (value < lowest || value > kLargestInteger) {
    fail(op, std::string(name) + " must be at least " + std::to_string(lowest) + " and at most " +
                 std::to_string(kLargestInteger) + ", got " + std::to_string(value));
  }
  return value;
}

inline std::int64_t read_groups(const char* op, std::int64_t groups) {
  return require_integer(op, "groups", groups, 1);
}

// How many threads a kernel asks OpenMP for, which ends the process where the system refuses one.
// More than a few for each processor are of no use, and no result depends on their number.
inline int read_threads(const char* op, std::int64_t threads) {
  static const std::int64_t most =
      std::max<std::int64_t>(16, 4 * std::int64_t{std::thread::hardware_concurrency()});
  return static_cast<int>(std::min(require_integer(op, "threads", threads, 1), most));
}

// The `count` integers of a call in one tuple: pybind11 converts arguments one by one, which costs
// more than a small convolution where they are many.
template <std::size_t kCount>
std::array<std::int64_t, kCount> read_integers(const char* op, const py::tuple& integers) {
  if (integers.size() != kCount) {
    fail(op, "problem must have " + std::to_string(kCount) + " integers");
  }
  std::array<std::int64_t, kCount> v;
  for (std::size_t i = 0; i < kCount; ++i) {
    v[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(integers.ptr(), i));
    if (v[i] == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
  return v;
}

// (stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w)
inline ConvWindow read_window(const char* op, const std::int64_t* v) {
  for (const int side : {0, 1}) {
    require_integer(op, "stride", v[side], 1);
    require_integer(op, "padding", v[2 + side], 0);
    require_integer(op, "dilation", v[4 + side], 1);
  }
  return {v[0], v[1], v[2], v[3], v[4], v[5]};
}

}  // namespace pyeff::bindings
