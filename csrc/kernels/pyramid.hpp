#pragma once

#include "image.hpp"

namespace msf {

// In these four `extent` is that of the base.
void pyramid_split(DType dtype, Extent extent, ImageView x, ImageView base, ImageView residual,
                   Statistics statistics, bool bilinear, Address stream);
void pyramid_split_backward(DType dtype, Extent extent, ImageView grad_base,
                            ImageView grad_residual, ImageView grad_x, Statistics statistics,
                            bool bilinear, Address stream);
void pyramid_merge(DType dtype, Extent extent, ImageView base, ImageView residual, ImageView x,
                   Statistics statistics, bool bilinear, Clamp clamp, Address stream);
void pyramid_merge_backward(DType dtype, Extent extent, ImageView grad, ImageView grad_base,
                            ImageView grad_residual, Statistics statistics, bool bilinear,
                            Address stream);

}  // namespace msf
