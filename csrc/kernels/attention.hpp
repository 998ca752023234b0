#pragma once

#include "heads.hpp"

namespace msf {

// Softmax attention of prepared 16-bit heads; all that is read lies at multiples of 16 bytes. out
// is (B, N, H, d) and contiguous, logsumexp (B, H, N) in float32, absent where no gradient is to
// come. A block may take `shared_limit` bytes of shared memory. Where a head does not fit into
// that, there must be nothing to prepare, and nowhere a LayerNorm.
bool attention_fits(HeadGrid grid, int shared_limit);
void attention(DType dtype, HeadGrid grid, HeadsView q, HeadsView k, HeadsView v,
               Preparation preparation, Address out, Address logsumexp, int shared_limit,
               Address stream);

// The gradient of attention, for heads that fit. partials is (5, H, B, d) in float32, absent where
// no parameter gets a gradient.
bool attention_backward_fits(HeadGrid grid, int shared_limit);
void attention_backward(DType dtype, HeadGrid grid, HeadsView q, HeadsView k, HeadsView v,
                        HeadsView out, HeadsView grad, Preparation preparation, Address logsumexp,
                        Address grad_qkv, Address partials, PreparationGradient sums,
                        Address stream);

}  // namespace msf
