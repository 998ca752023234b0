// A warp holds heads of attention in registers, as many as fit.
//
// A head takes neighbouring lanes of the warp. A lane holds the same elements of both halves of the
// head, so that it has the pairs (i, i + d / 2) that RoPE rotates.
#pragma once

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
  static constexpr int kSize = kVector * kTurns;
  C first[kSize] = {}, second[kSize] = {};

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

  // Rotates by the angles of a token, whose cosines are the first half of `angle`, the sines the
  // second.
  __device__ void rotate(const Fragment& angle, C sign) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const C cos = angle.first[k], sin = sign * angle.second[k], x = first[k], y = second[k];
      first[k] = x * cos - y * sin;
      second[k] = y * cos + x * sin;
    }
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

template <class C, int V, int S>
__device__ C sum_of_squares(const Fragment<C, V, S>& x) {
  C sum = 0;
#pragma unroll
  for (int k = 0; k < V * S; ++k) sum += x.first[k] * x.first[k] + x.second[k] * x.second[k];
  return sum;
}

}  // namespace msf
