#pragma once

#include "../types.hpp"

namespace msf {

// The dtypes of x, of y (that of x where there is no y), and of gate, shift and scale together.
struct AdalnTypes {
  DType x, y, modulation;
};

// The sizes of contiguous tokens (B, N, D). A team of threads takes a slice of `length`
// of a sample's tokens.
struct TokenSlices {
  int batch, tokens, channels, length;
};

// A modulation (B, D) whose rows are `stride` elements apart, 0 if all samples share one row. The
// channels of a row are contiguous.
struct Modulation {
  Address data;
  int64_t stride = 0;
};

// x, y, x_out and h are (B, N, D), mean and rstd (B, N) in the compute dtype. x_out is absent
// without y and gate; h, shift, scale, mean and rstd are absent where nothing is normalised, and
// mean and rstd where no gradient is to come. With `rms` the norm subtracts no mean, which is 0
// then.
void gate_residual_adaln(AdalnTypes types, TokenSlices size, Address x, Address y, Parameter y_bias,
                         Modulation gate, Modulation shift, Modulation scale, double eps,
                         bool eager, bool rms, Address x_out, Address h, Address mean, Address rstd,
                         Address stream);

// The gradient of a modulation: (B, D) or, with `shared`, (1, D).
struct ModulationGradient {
  Address data;
  bool shared = false;
};

// The gradients of gate_residual_adaln, whose x_out is called x here. `partials` is (4, B, slices,
// D) in the compute dtype, and absent where each sample has one slice and a modulation of its own,
// and y has no bias.
// grad_x_out may be absent. Where nothing was normalised there is grad_x_out without grad_h, and no
// grad_x.
void gate_residual_adaln_backward(AdalnTypes types, TokenSlices size, Address grad_h,
                                  Address grad_x_out, Address x, Address y, Parameter y_bias,
                                  Modulation gate, Modulation scale, Address mean, Address rstd,
                                  bool rms, Address grad_x, Address grad_y, Parameter grad_y_bias,
                                  ModulationGradient grad_gate, ModulationGradient grad_shift,
                                  ModulationGradient grad_scale, Address partials, Address stream);

}  // namespace msf
