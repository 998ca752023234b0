// The launchers, which bindings.cpp offers to Python. Each is defined beside its kernels, in
// kernels/<op>.cu, starts them on `stream`, and throws std::runtime_error if they cannot start.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MSF_HOST_DEVICE __host__ __device__
#else
#define MSF_HOST_DEVICE
#endif

namespace msf {

// The address of data on the GPU, or of a stream.
struct Address {
  void* value = nullptr;

  template <class T>
  MSF_HOST_DEVICE T* as() const {
    return static_cast<T*>(value);
  }
  MSF_HOST_DEVICE explicit operator bool() const { return value != nullptr; }
};

enum class DType { float64, float32, bfloat16, float16 };

// An image (B, C, H, W) with its strides in elements. An absent image has no data.
struct ImageView {
  Address data;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

// The sizes of an image (B, C, H, W).
struct Extent {
  int batch, channels, height, width;
};

// The mean and deviation (C,) of each channel in the compute dtype; each may be absent.
struct Statistics {
  Address mean, std;
};

struct Clamp {
  double low, high;
};

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

// Tokens (B, N, D) whose samples are contiguous, `batch` elements from one to the next. Absent ones
// have no data.
struct TokensView {
  Address data;
  int64_t batch = 0;
};

// The sizes of merge_tokens: base is (B, h * w, 4 * D), position (4 * h * w, D), condition (B, C,
// D), x (B, C + 4 * h * w, D), all other tensors are (B, 4 * h * w, D), and what is given by its
// address is contiguous. position has the dtype of the others or float32.
struct TokenGrid {
  int batch, height, width, channels;  // B, h, w and D
};

void merge_tokens(DType dtype, DType position_dtype, TokenGrid grid, TokensView base,
                  TokensView skip, Address position, TokensView condition, int condition_tokens,
                  Address x, Address stream);
void merge_tokens_backward(DType dtype, DType position_dtype, TokenGrid grid, TokensView grad,
                           Address grad_base, Address grad_position, Address stream);

// All tensors are (batch, size) and contiguous, but t is (batch,) in the compute dtype.
void flow_interpolate(DType dtype, int64_t batch, int64_t size, Address data, Address noise,
                      Address t, Address x_t, Address velocity, Address stream);

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

// A bias or norm weight, or its gradient, in the dtype of what it belongs to or float32. An absent
// one has no data.
struct Parameter {
  Address data;
  DType dtype = DType::float32;
};

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

// q_out and k_out (B, N, H, d) and grad_qkv (B, N, 3, H, d) are contiguous. Partial sums are in the
// compute dtype and absent for absent parameters: with n = max_partials + H, (4, n, d) of the
// norms' weights and biases, and (3, n min(H, 256), d) of qkv's bias.
void qk_norm_rope(DType dtype, HeadGrid grid, HeadsView q, HeadsView k, Preparation preparation,
                  Address q_out, Address k_out, Address stream);
void qk_norm_rope_backward(DType dtype, HeadGrid grid, HeadsView grad_q, HeadsView grad_k,
                           HeadsView grad_v, HeadsView q, HeadsView k, Preparation preparation,
                           Address grad_qkv, Address norm_partials, Address bias_partials,
                           int max_partials, PreparationGradient sums, Address stream);

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
