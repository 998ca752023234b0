#pragma once

#include "../types.hpp"

namespace msf {

// x, out and their gradients are (rows, channels) and contiguous; the bias (channels,) may be
// absent. A block takes `length` rows. With `tanh` gelu is the approximation by it. The backward
// writes the sums of its blocks to partials (slices, channels), in the compute dtype and absent
// without a bias.
void bias_gelu(DType dtype, int64_t rows, int channels, int length, bool tanh, Address x,
               Parameter bias, Address out, Address stream);
void bias_gelu_backward(DType dtype, int64_t rows, int channels, int length, bool tanh,
                        Address grad, Address x, Parameter bias, Address grad_x,
                        Parameter grad_bias, Address partials, Address stream);

}  // namespace msf
