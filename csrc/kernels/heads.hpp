// The heads of attention, as launchers are given them.
#pragma once

#include "../types.hpp"

namespace msf {

// Heads (B, N, H, d) with strides in elements; the stride of d is 1. Absent heads have no data.
struct HeadsView {
  Address data;
  int64_t batch = 0, token = 0, head = 0;
};

struct HeadGrid {
  int batch, tokens, heads, head_dim;
};

// What heads pass on their way into attention: a bias, then for q and k a norm and a rotation. The
// norm is RMS norm or, with `layer`, LayerNorm, which alone has biases.
struct Preparation {
  Parameter bias;                      // (3, H, d), of q, k and v
  Parameter q_weight, k_weight;        // (d,)
  Parameter q_norm_bias, k_norm_bias;  // (d,)
  Address rope;                        // (2, N, d / 2) in float32
  double eps = 0;
  bool layer = false;
  MSF_HOST_DEVICE explicit operator bool() const {
    return bias.data || q_weight.data || k_weight.data || rope;
  }
};

struct PreparationGradient {
  Parameter bias, q_weight, k_weight, q_norm_bias, k_norm_bias;
};

}  // namespace msf
