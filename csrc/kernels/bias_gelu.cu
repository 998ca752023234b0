// bias_gelu and its gradient, each in one pass over memory. The equations are in
// msf_kernels/bias_gelu/reference.py.
//
// In 16 bits at the 4.3 TB/s of an H200 an SM moves 4.6 elements a cycle in forward and 3.1 in
// backward. It has 128 instructions a cycle, of which 16 of the special function unit: so an
// element may take 27 and 3 in forward, 41 and 5 in backward. On sm_90 it takes 14 by tanh and 22
// by erf in forward, 23 and 28 in backward, two of them an exponential and a reciprocal.
#include "bias_gelu.hpp"
#include "dispatch.cuh"
#include "fast_math.cuh"
#include "parameter.cuh"
#include "partials.cuh"

namespace msf {
namespace {

// 64 vectors of 16 bytes are 512 channels in 16 bits: the hidden layers of DiT-S to XL, 4 * 384 to
// 4 * 1152 wide, have a multiple of that, so that no thread idles.
constexpr int kColumns = 64, kThreadRows = kThreads / kColumns;

// The rows that a thread loads before it uses the first. So an SM has 40 KB in flight in forward,
// from 5 blocks, and 48 in backward, from two tensors and 3 blocks. It needs 24 (latency_bound.py).
constexpr int kAhead = 2;

// How much of a distribution lies beyond a, which is not negative, and the density there.
template <class C>
struct Tail {
  C beyond, density;
};

// The distribution of gelu by tanh: sigmoid(-2 u) where u = sqrt(2 / pi) * (a + 0.044715 a^3). The
// factors are those of a and a^3 in 2 u, for float over log(2).
__device__ inline Tail<float> logistic_tail(float a) {
  const float power = exp2_fast(a * fmaf(0.1029432396f, a * a, 2.3022081981f));
  const float beyond = reciprocal_fast(1 + power);
  return {beyond, beyond * (1 - beyond) * fmaf(3 * 0.0713548163f, a * a, 1.5957691216f)};
}
__device__ inline Tail<double> logistic_tail(double a) {
  constexpr double kLinear = 1.5957691216057308, kCubic = 0.044715 * kLinear;
  const double beyond = 1 / (1 + exp(a * (kLinear + kCubic * a * a)));
  return {beyond, beyond * (1 - beyond) * (kLinear + 3 * kCubic * a * a)};
}

// The normal distribution. In float `beyond` is exp(-a^2 / 2) * t * p(t) where t = 1 / (1 + 0.3 a);
// the polynomial p was fitted to the least relative error from a = 0 to 14, which is 1.5e-7.
__device__ inline Tail<float> normal_tail(float a) {
  const float bell = exp2_fast(a * a * -0.7213475204f);
  const float t = reciprocal_fast(fmaf(0.3f, a, 1.0f));
  float p = 0.0356747786f;
  p = fmaf(p, t, -0.157203101f);
  p = fmaf(p, t, 0.206353537f);
  p = fmaf(p, t, -0.0536836714f);
  p = fmaf(p, t, 0.12856164f);
  p = fmaf(p, t, 0.0999134882f);
  p = fmaf(p, t, 0.120753957f);
  p = fmaf(p, t, 0.119629299f);
  return {bell * t * p, bell * 0.3989422804f};
}
__device__ inline Tail<double> normal_tail(double a) {
  return {erfc(a * 0.70710678118654752) / 2, exp(a * a / -2) * 0.39894228040143268};
}

// gelu(x) is x times the share of the distribution below x. Both are computed from the tail, which
// keeps its relative precision, but for that of the exponent: as does that of x + bias, which is
// rounded too.
template <bool kTanh, class C>
struct Gelu {
  C x, a;  // a = |x|, at most 14, where all is saturated: beyond, infinity would meet 0
  Tail<C> tail;

  __device__ explicit Gelu(C x) : x(x), a(std::fabs(x)) {
    if (a > 14) a = 14;  // unlike a minimum this lets NaN pass
    if constexpr (kTanh) {
      tail = logistic_tail(a);
    } else {
      tail = normal_tail(a);
    }
  }
  __device__ C value() const { return std::fma(-a, tail.beyond, std::fmax(x, C(0))); }

  // The derivatives at x and -x add up to 1.
  __device__ C derivative() const {
    const C negative = std::fma(-a, tail.density, tail.beyond);
    return x < 0 ? negative : 1 - negative;
  }
};

// What a thread has of a tensor (rows, channels): a vector of every kThreadRows-th row of a slice.
// Neighbouring blocks have neighbouring columns of the same slice.
template <int kVector>
struct Place {
  int channel;
  int64_t slice, first, end;

  __device__ Place(int64_t rows, int channels, int length) {
    const int columns = (channels + kColumns * kVector - 1) / (kColumns * kVector);
    channel = (blockIdx.x % columns * kColumns + threadIdx.x) * kVector;
    slice = blockIdx.x / columns;
    end = (slice + 1) * length < rows ? (slice + 1) * length : rows;
    first = channel < channels ? slice * length + threadIdx.y : end;
  }

  // Calls body(number of rows, the first of them) until the slice ends: with kAhead rows as long as
  // there are so many. A test before each load would make it wait for the load before.
  template <class Body>
  __device__ void each(const Body& body) const {
    int64_t row = first;
    for (; row + (kAhead - 1) * kThreadRows < end; row += kAhead * kThreadRows) {
      body(std::integral_constant<int, kAhead>{}, row);
    }
#pragma unroll 1
    for (; row < end; row += kThreadRows) body(std::integral_constant<int, 1>{}, row);
  }
};

// registers: 48
template <class T, int kVector, bool kTanh>
__global__ void __launch_bounds__(kThreads, 5)
    bias_gelu_kernel(int64_t rows, int channels, int length,
                     const T* x,      // (rows, channels)
                     Parameter bias,  // (channels,) or absent
                     T* out) {        // (rows, channels)
  using C = Compute<T>;
  const Place<kVector> place(rows, channels, length);
  if (place.first >= place.end) return;
  const auto shift = load_parameter<T, kVector>(bias, place.channel);
  place.each([&](auto count, int64_t row) {
    const int64_t at = row * channels + place.channel;
    Vector<T, kVector> values[count.value];
#pragma unroll
    for (int r = 0; r < count.value; ++r) {
      values[r] = values[r].load(x + at + int64_t(r * kThreadRows) * channels);
    }
#pragma unroll
    for (int r = 0; r < count.value; ++r) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        values[r][k] = from_compute<T>(Gelu<kTanh, C>(to_compute(values[r][k]) + shift[k]).value());
      }
      values[r].store(out + at + int64_t(r * kThreadRows) * channels);
    }
  });
}

// registers: 80
template <class T, int kVector, bool kTanh>
__global__ void __launch_bounds__(kThreads, 3)
    bias_gelu_backward_kernel(int64_t rows, int channels, int length,
                              const T* grad,           // (rows, channels)
                              const T* x,              // (rows, channels)
                              Parameter bias,          // (channels,) or absent
                              T* grad_x,               // (rows, channels)
                              Compute<T>* partials) {  // (slices, channels) or absent
  using C = Compute<T>;
  MSF_SHARED(C, shared, kThreads * kVector);
  const Place<kVector> place(rows, channels, length);
  Vector<C, kVector> shift{}, total{};
  if (place.first < place.end) shift = load_parameter<T, kVector>(bias, place.channel);
  place.each([&](auto count, int64_t row) {
    const int64_t at = row * channels + place.channel;
    Vector<T, kVector> grads[count.value], values[count.value];
#pragma unroll
    for (int r = 0; r < count.value; ++r) {
      grads[r] = grads[r].load(grad + at + int64_t(r * kThreadRows) * channels);
      values[r] = values[r].load(x + at + int64_t(r * kThreadRows) * channels);
    }
#pragma unroll
    for (int r = 0; r < count.value; ++r) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const Gelu<kTanh, C> gelu(to_compute(values[r][k]) + shift[k]);
        const C product = to_compute(grads[r][k]) * gelu.derivative();
        total[k] += product;
        values[r][k] = from_compute<T>(product);
      }
      values[r].store(grad_x + at + int64_t(r * kThreadRows) * channels);
    }
  });
  if (!partials) return;
  // A sum over the block's rows of threads, in their order.
  total.store(shared + (threadIdx.y * kColumns + threadIdx.x) * kVector);
  __syncthreads();
  if (threadIdx.y > 0 || place.channel >= channels) return;
  for (int other = 1; other < kThreadRows; ++other) {
    const auto more = total.load(shared + (other * kColumns + threadIdx.x) * kVector);
#pragma unroll
    for (int k = 0; k < kVector; ++k) total[k] += more[k];
  }
  total.store(partials + place.slice * channels + place.channel);
}

// Calls body(Type<T>{}, kVector, kTanh, number of blocks), with vectors of 16 bytes where the
// channels and addresses allow them.
template <class Body>
void with_gelu(DType dtype, int64_t rows, int channels, int length, bool tanh,
               std::initializer_list<Address> addresses, Body body) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWhole = sizeof(T) < 8 ? 16 / sizeof(T) : 1;
    with_flag(kWhole > 1 && channels % kWhole == 0 && is_aligned(addresses), [&](auto wide) {
      constexpr int kVector = decltype(wide)::value ? kWhole : 1;
      const int64_t columns = (channels + kColumns * kVector - 1) / (kColumns * kVector);
      const auto blocks = unsigned(columns * ((rows + length - 1) / length));
      with_flag(tanh, [&](auto kind) {
        body(type, std::integral_constant<int, kVector>{}, kind, dim3(blocks));
      });
    });
  });
}

}  // namespace

void bias_gelu(DType dtype, int64_t rows, int channels, int length, bool tanh, Address x,
               Parameter bias, Address out, Address stream) {
  if (rows == 0 || channels == 0) return;
  with_gelu(dtype, rows, channels, length, tanh, {x, bias.data, out},
            [&](auto type, auto vector, auto kind, dim3 blocks) {
              using T = typename decltype(type)::type;
              launch<bias_gelu_kernel<T, vector.value, kind.value>>(
                  blocks, dim3(kColumns, kThreadRows), 0, cuda_stream(stream), rows, channels,
                  length, x.as<const T>(), bias, out.as<T>());
            });
}

void bias_gelu_backward(DType dtype, int64_t rows, int channels, int length, bool tanh,
                        Address grad, Address x, Parameter bias, Address grad_x,
                        Parameter grad_bias, Address partials, Address stream) {
  if (channels == 0) return;
  with_gelu(dtype, rows, channels, length, tanh, {grad, x, bias.data, grad_x, partials},
            [&](auto type, auto vector, auto kind, dim3 blocks) {
              using T = typename decltype(type)::type;
              auto* const parts = partials.as<Compute<T>>();
              if (rows > 0) {
                launch<bias_gelu_backward_kernel<T, vector.value, kind.value>>(
                    blocks, dim3(kColumns, kThreadRows), 0, cuda_stream(stream), rows, channels,
                    length, grad.as<const T>(), x.as<const T>(), bias, grad_x.as<T>(), parts);
              }
              if (!grad_bias.data) return;
              const int64_t slices = (rows + length - 1) / length;
              const PartialSums<Compute<T>> sums{parts, grad_bias.data, grad_bias.dtype, 1, slices};
              sum_partials(channels, {sums, {}, {}, {}}, stream);
            });
}

}  // namespace msf
