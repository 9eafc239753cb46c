#pragma once
// What every convolution operator says about its kernel's place.

#include <cstdint>

namespace pyeff {

// Where the kernel lies over the image. Rows and columns outside of it count as zero, so padding
// at the bottom and the right follows from the size of y.
struct ConvWindow {
  std::int64_t stride_h, stride_w;
  std::int64_t pad_top, pad_left;
  std::int64_t dilation_h, dilation_w;
};

}  // namespace pyeff
