#pragma once

#include "../types.hpp"

namespace msf {

// All tensors are (batch, size) and contiguous, but t is (batch,) in the compute dtype.
void flow_interpolate(DType dtype, int64_t batch, int64_t size, Address data, Address noise,
                      Address t, Address x_t, Address velocity, Address stream);

}  // namespace msf
