// Images, as launchers are given them.
#pragma once

#include "../types.hpp"

namespace msf {

// An image (B, C, H, W) with its strides in elements. An absent image has no data.
struct ImageView {
  Address data;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

// The sizes of an image (B, C, H, W).
struct Extent {
  int batch, channels, height, width;
};

// The mean and deviation (C,) of each channel in the compute dtype; each may be absent.
struct Statistics {
  Address mean, std;
};

struct Clamp {
  double low, high;
};

}  // namespace msf
