#pragma once

#include "heads.hpp"

namespace msf {

// q_out and k_out (B, N, H, d) and grad_qkv (B, N, 3, H, d) are contiguous. Partial sums are in the
// compute dtype and absent for absent parameters: with n = max_partials + H, (4, n, d) of the
// norms' weights and biases, and (3, n min(H, 256), d) of qkv's bias.
void qk_norm_rope(DType dtype, HeadGrid grid, HeadsView q, HeadsView k, Preparation preparation,
                  Address q_out, Address k_out, Address stream);
void qk_norm_rope_backward(DType dtype, HeadGrid grid, HeadsView grad_q, HeadsView grad_k,
                           HeadsView grad_v, HeadsView q, HeadsView k, Preparation preparation,
                           Address grad_qkv, Address norm_partials, Address bias_partials,
                           int max_partials, PreparationGradient sums, Address stream);

}  // namespace msf
