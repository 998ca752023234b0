#pragma once

#include "image.hpp"

namespace msf {

// A number that the host knows, or a table (steps,) in the compute dtype on the GPU.
struct Scalar {
  double value;
  Address table;
};

// A guided Euler step follows the velocities cond and uncond, of one dtype; uncond may be absent.
// They are images (B, C, H, W) or, with patch_size P > 0, contiguous tokens (B, H/P * W/P, P * P *
// C), of whose strides only that of the batch counts. Tables are read at *index, or at 0 if it is
// absent.
struct EulerStep {
  DType dtype;
  ImageView cond, uncond;
  Scalar guidance_scale, dt;
  Address index;
  int patch_size;
};

// x, start, x_next and the velocities have `size` elements, which lie in the same order without
// gaps.
void guided_euler_step(DType dtype, int64_t size, Address x, EulerStep step, Address start,
                       Address x_next, Address stream);
// `extent` is that of x.
void guided_euler_step_of_tokens(DType dtype, Extent extent, ImageView x, EulerStep step,
                                 ImageView start, ImageView x_next, Address stream);
// `extent` is that of the base.
void guided_euler_merge(DType dtype, Extent extent, ImageView x, EulerStep step, ImageView base,
                        ImageView merged, Statistics statistics, bool bilinear, Clamp clamp,
                        Address stream);

}  // namespace msf
