// What bindings.cpp calls. Every function is defined beside its kernels, in kernels/<op>.cu, starts
// them on `stream` and throws std::runtime_error if they cannot start.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MSF_HOST_DEVICE __host__ __device__
#else
#define MSF_HOST_DEVICE
#endif

namespace msf {

// Of data on the GPU, or of a stream.
struct Address {
  void* value = nullptr;

  template <class T>
  MSF_HOST_DEVICE T* as() const {
    return static_cast<T*>(value);
  }
  MSF_HOST_DEVICE explicit operator bool() const { return value != nullptr; }
};

enum class DType { float64, float32, bfloat16, float16 };

// An image (B, C, H, W) in memory; strides in elements. An absent one has no data.
struct ImageView {
  Address data;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

// Sizes of images (B, C, H, W).
struct Extent {
  int batch, channels, height, width;
};

// Per-channel mean and deviation (C,) in the compute dtype, each or both absent.
struct Statistics {
  Address mean, std;
};

struct Clamp {
  double low, high;
};

// In all of these `extent` is that of the base.
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

// Base tokens (B, h * w, 4 * D); the others are (B, 4 * h * w, D), position (4 * h * w, D), all
// contiguous. position is of position_dtype, dtype or float32.
struct TokenGrid {
  int batch, height, width, channels;  // B, h, w and D
};

void merge_tokens(DType dtype, DType position_dtype, TokenGrid grid, Address base, Address skip,
                  Address position, Address x, Address stream);
void merge_tokens_backward(DType dtype, DType position_dtype, TokenGrid grid, Address grad,
                           Address grad_base, Address grad_position, Address stream);

// Tensors (batch, size), t (batch,) in the compute dtype.
void flow_interpolate(DType dtype, int64_t batch, int64_t size, Address data, Address noise,
                      Address t, Address x_t, Address velocity, Address stream);

// A number that the host knows, or a table in the compute dtype on the GPU.
struct Scalar {
  double value;
  Address table;
};

// What a step follows: velocities of one dtype as images or, with patch > 0, as contiguous tokens
// (B, H/p * W/p, p * p * C) of which only the batch stride counts. Tables are read at row *step, or
// at 0.
struct Velocity {
  DType dtype;
  ImageView cond, uncond;
  Scalar guidance_scale, dt;
  Address step;
  int patch;
};

// x, start, x_next and the velocities are dense in one layout of `size` elements.
void guided_euler_step(DType dtype, int64_t size, Address x, Velocity velocity, Address start,
                       Address x_next, Address stream);
// `extent` is x's own.
void guided_euler_step_of_tokens(DType dtype, Extent extent, ImageView x, Velocity velocity,
                                 ImageView start, ImageView x_next, Address stream);
// `extent` is that of the base.
void guided_euler_merge(DType dtype, Extent extent, ImageView x, Velocity velocity, ImageView base,
                        ImageView merged, Statistics statistics, bool bilinear, Clamp clamp,
                        Address stream);

// Dtypes of x, of y (x's where there is none), and of gate, shift and scale alike.
struct AdalnTypes {
  DType x, y, modulation;
};

// Tokens (B, N, D), contiguous; a block of threads has a slice of `length` of a sample's tokens.
struct TokenSlices {
  int batch, tokens, channels, length;
};

// (B, D), rows of contiguous channels `stride` elements apart: 0 if all samples share one.
struct Modulation {
  Address data;
  int64_t stride = 0;
};

// x_out is absent without y and gate; h, shift, scale and the statistics, (B, N) in the compute
// dtype, are absent where nothing is normalised.
void gate_residual_adaln(AdalnTypes types, TokenSlices size, Address x, Address y, Modulation gate,
                         Modulation shift, Modulation scale, double eps, bool eager, Address x_out,
                         Address h, Address mean, Address rstd, Address stream);

// Where the gradient of a modulation goes: (B, D) or, with `shared`, (1, D).
struct ModulationGradient {
  Address data;
  bool shared = false;
};

// The gradients of the above, x being its x_out. `partials` (3, B, slices, D) in the compute dtype
// is absent where each sample has one slice and a modulation of its own. grad_x_out may be absent;
// it alone comes in, and grad_x does not go out, where nothing was normalised.
void gate_residual_adaln_backward(AdalnTypes types, TokenSlices size, Address grad_h,
                                  Address grad_x_out, Address x, Address y, Modulation gate,
                                  Modulation scale, Address mean, Address rstd, Address grad_x,
                                  Address grad_y, ModulationGradient grad_gate,
                                  ModulationGradient grad_shift, ModulationGradient grad_scale,
                                  Address partials, Address stream);

// Heads (B, N, H, d) whose elements are neighbours; strides in elements. Absent ones have no data.
struct HeadsView {
  Address data;
  int64_t batch = 0, token = 0, head = 0;
};

struct HeadGrid {
  int batch, tokens, heads, head_dim;
};

// A norm weight (d,), or its gradient, in the dtype of the heads or float32; or none.
struct NormWeight {
  Address data;
  DType dtype = DType::float32;
};

// rope (2, N, d / 2) is float32; q_out and k_out (B, N, H, d) and grad_qkv (B, N, 3, H, d) are
// contiguous. partial has room for (2, most_partials, d) in the compute dtype, none without
// weights.
void qk_norm_rope(DType dtype, HeadGrid grid, HeadsView q, HeadsView k, NormWeight q_weight,
                  NormWeight k_weight, Address rope, double eps, Address q_out, Address k_out,
                  Address stream);
void qk_norm_rope_backward(DType dtype, HeadGrid grid, HeadsView grad_q, HeadsView grad_k,
                           HeadsView grad_v, HeadsView q, HeadsView k, NormWeight q_weight,
                           NormWeight k_weight, Address rope, double eps, Address grad_qkv,
                           Address partial, int most_partials, NormWeight grad_q_weight,
                           NormWeight grad_k_weight, Address stream);

}  // namespace msf
