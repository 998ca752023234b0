// A head of attention in the registers of a warp and the shared memory of a block.
//
// Four neighbouring lanes, a quad, share a row: q or k of one token. In the operand of a product
// lane t of a quad has the columns 8 j + 2 t and 8 j + 2 t + 1 of every 8. A score is a sum over
// channels in any order, so where q and k are normalised and rotated their columns hold other
// channels than their own, the same ones in both: those for which the pairs (i, i + d / 2) that
// RoPE rotates lie in one lane, and which it reads in accesses of up to 16 bytes.
#pragma once

#include "tensor_cores.cuh"

namespace msf {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// What one lane of a quad holds of a head of kDim channels: some of the first half and the same of
// the second. A lane has a run of up to 8 channels and what is left of its quarter: at 72 channels
// lane 1 has 8 to 15 and 33 of the first half, 44 to 51 and 69 of the second.
template <int kDim>
struct QuadHead {
  static_assert(kDim % 8 == 0 && (kDim <= 64 || kDim % 16 == 0 || kDim == 72));
  static constexpr int kHalf = kDim / 2, kShare = kHalf / 4;
  static constexpr int kRun = kShare < 8 ? kShare : 8, kRest = kShare - kRun;
  float first[kShare], second[kShare];

  template <class T>
  __device__ void load(const T* head, int lane) {
    load_half(first, head, lane);
    load_half(second, head + kHalf, lane);
  }

  // Angles of a token: `first` gets the cosines, `second` the sines, (d / 2) each.
  __device__ void load_angles(const float* cos, const float* sin, int lane) {
    load_half(first, cos, lane);
    load_half(second, sin, lane);
  }

  __device__ float sum_of_squares() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kShare; ++i) sum += first[i] * first[i] + second[i] * second[i];
    return quad_sum(sum);
  }

  // Divides by the root mean square and multiplies by the weight.
  __device__ void normalise(const QuadHead& weight, float eps) {
    const float rrms = reciprocal_root(sum_of_squares() / kDim + eps);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      first[i] = first[i] * rrms * weight.first[i];
      second[i] = second[i] * rrms * weight.second[i];
    }
  }

  // Rotates by a token's angles.
  __device__ void rotate(const QuadHead& angle) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const float x = first[i], y = second[i];
      first[i] = x * angle.first[i] - y * angle.second[i];
      second[i] = y * angle.first[i] + x * angle.second[i];
    }
  }

  // The registers of an operand: of neighbouring channels of the lane, first half before second.
  template <class T>
  __device__ uint32_t packed(int j) const {
    return pack<T>(channel(2 * j), channel(2 * j + 1));
  }

 private:
  __device__ float channel(int i) const { return i < kShare ? first[i] : second[i - kShare]; }

  template <class T>
  __device__ static void load_half(float* to, const T* half, int lane) {
    // Half of 72 16-bit channels is 8 bytes off a multiple of 16.
    constexpr int kAligned = sizeof(T) == 2 && kHalf % 8 ? 4 : 16 / sizeof(T);
    load_run<kRun, (kRun < kAligned ? kRun : kAligned)>(to, half + kRun * lane);
    if constexpr (kRest) {
      load_run<kRest, (kRest < kAligned ? kRest : kAligned)>(to + kRun,
                                                             half + 4 * kRun + kRest * lane);
    }
  }

  template <int kCount, int kVector, class T>
  __device__ static void load_run(float* to, const T* from) {
#pragma unroll
    for (int i = 0; i < kCount; i += kVector) {
      const auto vector = Vector<T, kVector>::load(from + i);
#pragma unroll
      for (int k = 0; k < kVector; ++k) to[i + k] = to_compute(vector[k]);
    }
  }
};

// What q or k pass before they are compared.
struct Preparation {
  NormWeight weight;  // (d,) or absent
  const float* rope;  // (2, tokens, d / 2) or absent
  float eps;

  __device__ explicit operator bool() const { return weight.data || rope; }

  template <class T, int kDim>
  __device__ void load_weight(QuadHead<kDim>& to, int lane) const {
    if (!weight.data) return;
    if (weight.dtype == DType::float32) {
      to.load(weight.data.as<const float>(), lane);
    } else {
      to.load(weight.data.as<const T>(), lane);
    }
  }

  template <int kDim>
  __device__ void apply(QuadHead<kDim>& x, const QuadHead<kDim>& w, int token, int tokens,
                        int lane) const {
    if (weight.data) x.normalise(w, eps);
    if (!rope) return;
    QuadHead<kDim> angle;
    angle.load_angles(rope + int64_t(token) * (kDim / 2),
                      rope + int64_t(tokens + token) * (kDim / 2), lane);
    x.rotate(angle);
  }
};

// Rows of kDim 16-bit elements in shared memory. They are an odd number of 16-byte vectors apart, so
// that the same columns of 8 rows, which ldmatrix reads at once, lie in all 32 banks.
template <class T, int kDim>
struct Rows {
  static constexpr int kVectors = kDim / 8;
  static constexpr int kPitch = (kVectors | 1) * 8;  // elements
  T* data;

  __device__ T* at(int row, int column = 0) const { return data + row * kPitch + column; }
  __host__ __device__ static size_t bytes(int rows) { return size_t(rows) * kPitch * sizeof(T); }

  // Starts to copy rows [first, first + count) of a head, which has `tokens`; zeros follow its end.
  __device__ void copy(const T* head, int64_t stride, int first, int count, int tokens) const {
    const int column = threadIdx.x % kVectors * 8, step = blockDim.x / kVectors;
    int row = threadIdx.x / kVectors;
    if (row >= step) return;  // the block's last threads, which have no whole row
    for (; row < count; row += step) {
      copy_async(at(row, column), head + (first + row) * stride + column, first + row < tokens);
    }
  }
};

}  // namespace msf
