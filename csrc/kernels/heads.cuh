// A warp holds heads of attention in registers, as many as fit.
//
// A head takes neighbouring lanes of the warp. A lane holds the same elements of both halves of the
// head, so that it has the pairs (i, i + d / 2) that RoPE rotates.
#pragma once

#include "heads.hpp"
#include "launch.cuh"

namespace msf {

constexpr int kWarps = kThreads / kWarp;  // warps of a block

// How heads are spread over the lanes of a warp, and which lane this thread is.
struct Lanes {
  int head_dim;
  int half;   // elements of the first half, which has one more if head_dim is odd
  int count;  // lanes that hold a head
  int group;  // index of the head in the warp
  int lane;   // index of the lane in the head

  __host__ __device__ Lanes(int head_dim, int vector)
      : head_dim(head_dim),
        half((head_dim + 1) / 2),
        count(half / vector < kWarp ? half / vector : kWarp),
        group(0),
        lane(0) {}

  __device__ Lanes mine() const {
    Lanes lanes = *this;
    lanes.group = threadIdx.x % kWarp / count;
    lanes.lane = threadIdx.x % kWarp % count;
    return lanes;
  }
  __host__ __device__ int groups() const { return kWarp / count; }
  // Lanes beyond the last head that fits into a warp hold none.
  __device__ bool idle() const { return group == groups(); }
  // The index of this thread's head in the block, and the number of heads in a block.
  __device__ int64_t head() const { return threadIdx.x / kWarp * groups() + group; }
  __host__ __device__ int64_t heads() const { return kWarps * groups(); }

  // Returns the sum over the lanes of a head, in their order. The whole warp must call it together.
  template <class C>
  __device__ C sum(C value) const {
    C total = 0;
    for (int i = 0; i < count; ++i) {
      total += __shfl_sync(0xffffffffu, value, (group * count + i) % kWarp);
    }
    return total;
  }
};

// The fragment of a head that one lane holds: in each of kTurns turns kVector elements of both
// halves. With more than one turn, or with vectors of one element, some of these may not exist.
template <class C, int kVector, int kTurns>
struct Fragment {
  using Lanes = msf::Lanes;
  static constexpr int kSize = kVector * kTurns;
  C first[kSize] = {}, second[kSize] = {};

  static Lanes lanes(int head_dim) { return Lanes(head_dim, kVector); }

  // Calls body(index in the fragment, index in the half, whether the second half has it too).
  template <class Body>
  __device__ static void for_each_vector(const Lanes& lanes, Body body) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = (lanes.lane + turn * lanes.count) * kVector;
      if (kTurns == 1 || i < lanes.half) {
        body(turn * kVector, i, kVector > 1 || lanes.half + i < lanes.head_dim);
      }
    }
  }

  template <class T>
  __device__ void load(const T* head, const Lanes& lanes) {
    for_each_vector(lanes, [&](int at, int i, bool paired) {
      load_vector(first + at, head + i);
      if (paired) load_vector(second + at, head + lanes.half + i);
    });
  }

  template <class T>
  __device__ void store(T* head, const Lanes& lanes) const {
    for_each_vector(lanes, [&](int at, int i, bool paired) {
      store_vector(first + at, head + i);
      if (paired) store_vector(second + at, head + lanes.half + i);
    });
  }

  // Subtracts a number from the elements that exist.
  __device__ void subtract(C value, const Lanes& lanes) {
    for_each_vector(lanes, [&](int at, int, bool paired) {
#pragma unroll
      for (int k = at; k < at + kVector; ++k) {
        first[k] -= value;
        if (paired) second[k] -= value;
      }
    });
  }

  __device__ void load_angles(const float* cos, const float* sin, const Lanes& lanes) {
    for_each_vector(lanes, [&](int at, int i, bool) {
      load_vector(first + at, cos + i);
      load_vector(second + at, sin + i);
    });
  }

 private:
  template <class T>
  __device__ static void load_vector(C* to, const T* from) {
    const auto vector = Vector<T, kVector>::load(from);
#pragma unroll
    for (int k = 0; k < kVector; ++k) to[k] = to_compute(vector[k]);
  }
  template <class T>
  __device__ static void store_vector(const C* from, T* to) {
    Vector<T, kVector> vector;
#pragma unroll
    for (int k = 0; k < kVector; ++k) vector[k] = from_compute<T>(from[k]);
    vector.store(to);
  }
};

// What one lane does with its share of a head. A share has kSize elements of either half, `first`
// and `second`.

template <class Share>
__device__ auto sum_of_squares(const Share& x) {
  decltype(x.first[0] + x.first[0]) sum = 0;
#pragma unroll
  for (int i = 0; i < Share::kSize; ++i) {
    sum += x.first[i] * x.first[i] + x.second[i] * x.second[i];
  }
  return sum;
}

template <class Share, class C, class Lanes>
__device__ C reciprocal_rms(const Share& x, int dim, C eps, const Lanes& lanes) {
  return reciprocal_root(lanes.sum(sum_of_squares(x)) / dim + eps);
}

template <class Share>
__device__ void add(Share& x, const Share& y) {
#pragma unroll
  for (int i = 0; i < Share::kSize; ++i) {
    x.first[i] += y.first[i];
    x.second[i] += y.second[i];
  }
}

template <class Share, class C>
__device__ void normalise(Share& x, const Share& weight, C reciprocal_rms) {
#pragma unroll
  for (int i = 0; i < Share::kSize; ++i) {
    x.first[i] = x.first[i] * reciprocal_rms * weight.first[i];
    x.second[i] = x.second[i] * reciprocal_rms * weight.second[i];
  }
}

// Rotates by the angles of a token, of which `angle` has the cosines and then the sines; back where
// sign is -1.
template <class Share>
__device__ void rotate(Share& x, const Share& angle, int sign) {
#pragma unroll
  for (int i = 0; i < Share::kSize; ++i) {
    const auto cos = angle.first[i], sin = sign * angle.second[i];
    const auto first = x.first[i], second = x.second[i];
    x.first[i] = first * cos - second * sin;
    x.second[i] = second * cos + first * sin;
  }
}

// Replaces the gradient of a normalised head by that of x, and x by what the head gives to the
// gradient of the weight.
template <class Share, class C, class Lanes>
__device__ void norm_backward(Share& grad, Share& x, const Share& weight, C reciprocal_rms, int dim,
                              const Lanes& lanes) {
  C along = 0;
#pragma unroll
  for (int i = 0; i < Share::kSize; ++i) {
    x.first[i] *= reciprocal_rms;
    x.second[i] *= reciprocal_rms;
    along += grad.first[i] * weight.first[i] * x.first[i];
    along += grad.second[i] * weight.second[i] * x.second[i];
  }
  along = lanes.sum(along) / dim;
#pragma unroll
  for (int i = 0; i < Share::kSize; ++i) {
    const C first = x.first[i], second = x.second[i];
    x.first[i] *= grad.first[i];
    x.second[i] *= grad.second[i];
    grad.first[i] = (grad.first[i] * weight.first[i] - first * along) * reciprocal_rms;
    grad.second[i] = (grad.second[i] * weight.second[i] - second * along) * reciprocal_rms;
  }
}

}  // namespace msf
