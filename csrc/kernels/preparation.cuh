// What the heads of a block pass on their way into attention: bias, norm and rotation.
#pragma once

#include "quad_head.cuh"

namespace msf {

// The parameters of a head in shared memory, and what is done with them. A part is 0 for q, 1 for k
// and 2 for v.
template <int kDim>
struct PreparedHead {
  static constexpr int kParameters = 5;  // norm weights of q and k; biases of q, k and v
  const Preparation& given;
  float* shared;  // (kParameters, d)
  int tokens;

  __device__ float* weight(int part) const {
    return (part ? given.k_weight : given.q_weight).data ? shared + part * kDim : nullptr;
  }
  __device__ float* bias(int part) const {
    return given.bias.data ? shared + (2 + part) * kDim : nullptr;
  }

  // The block reads the parameters.
  template <class T>
  __device__ void load(int64_t head, int heads) const {
    for (int i = threadIdx.x; i < kParameters * kDim; i += blockDim.x) {
      const int part = i / kDim;
      const Parameter& x = part == 0 ? given.q_weight : part == 1 ? given.k_weight : given.bias;
      if (!x.data) continue;
      const int64_t at = (part < 2 ? 0 : ((part - 2) * heads + head) * kDim) + i % kDim;
      shared[i] = x.dtype == DType::float32 ? x.data.as<const float>()[at]
                                            : to_compute(x.data.as<const T>()[at]);
    }
  }

  // Prepares the words of a token of q or k, and rounds once.
  template <class T>
  __device__ void apply(uint32_t (&words)[kDim / 8], int part, int token, int lane) const {
    QuadHead<kDim> x, other;
    x.template unpack<T>(words);
    add_bias(x, part, lane);
    if (weight(part)) {
      other.load(weight(part), {0, lane});
      normalise(x, other, reciprocal_rms(x, kDim, float(given.eps), Quads{}));
    }
    if (given.rope) {
      load_angles(other, token, lane);
      rotate(x, other, 1);
    }
    x.template pack_into<T>(words);
  }

  // Replaces the gradient of what `apply` has made of x by that of x, and x by this token's part of
  // the gradient of the norm weight.
  __device__ void undo(QuadHead<kDim>& grad, QuadHead<kDim>& x, int part, int token,
                       int lane) const {
    QuadHead<kDim> other;
    if (given.rope) {
      load_angles(other, token, lane);
      rotate(grad, other, -1);
    }
    if (!weight(part)) return;
    add_bias(x, part, lane);
    other.load(weight(part), {0, lane});
    norm_backward(grad, x, other, reciprocal_rms(x, kDim, float(given.eps), Quads{}), kDim,
                  Quads{});
  }

 private:
  __device__ void add_bias(QuadHead<kDim>& x, int part, int lane) const {
    if (!bias(part)) return;
    QuadHead<kDim> other;
    other.load(bias(part), {0, lane});
    add(x, other);
  }

  __device__ void load_angles(QuadHead<kDim>& to, int token, int lane) const {
    const float* cos = given.rope.as<const float>() + int64_t(token) * (kDim / 2);
    to.load_angles(cos, cos + int64_t(tokens) * (kDim / 2), {0, lane});
  }
};

}  // namespace msf
