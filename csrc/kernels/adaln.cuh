// The parts that the adaLN kernels share. A block takes a slice of one sample's tokens, and a
// thread the same channels of each token: so it reads them once, and sums over tokens in registers.
#pragma once

#include "dispatch.cuh"
#include "launch.cuh"

namespace msf {

// The longest rows, of 8,192 channels in 16 bits, take blocks of 512 threads. An SM just has
// room for them at a budget of 128 registers a thread.
constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / kWarp;

inline int slices(const TokenSlices& size) { return (size.tokens + size.length - 1) / size.length; }

// Block (sample, slice) has the tokens [first, end), counted over all samples.
struct Slice {
  int sample;
  int64_t first, end;

  __device__ explicit Slice(const TokenSlices& size) : sample(blockIdx.x) {
    const int begin = int(blockIdx.y) * size.length, left = size.tokens - begin;
    first = int64_t(sample) * size.tokens + begin;
    end = first + (left < size.length ? left : size.length);
  }
};

// The number of tokens whose channels a thread holds at the same time, in at most `max_registers`
// of 32 bits. More tokens keep more loads in flight, fewer leave registers for more blocks. Without
// vectors it is one token, because each channel then has an address of its own in registers.
template <class T, int kVector, int kItems>
__host__ __device__ constexpr int rows_at_once(int max_registers) {
  const int registers = kVector * kItems * int(sizeof(Compute<T>)) / 4;
  return kVector > 1 && registers < max_registers ? max_registers / registers : 1;
}

// A thread has kItems vectors of kVector channels; those before `count` exist.
template <int kVector, int kItems>
struct Channels {
  int count;

  // Calls body(item, first channel of it) for each vector that exists.
  template <class Body>
  __device__ void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int channel = (i * int(blockDim.x) + int(threadIdx.x)) * kVector;
      if (channel < count) body(i, channel);
    }
  }
};

// Replaces each of kCount numbers by its sum over the block, with the same bits in every thread:
// first over the lanes of a warp by shuffles, then over the warps in their order. `shared` has room
// for kCount numbers a warp. All threads must meet at a barrier between two uses of the same
// memory.
template <int kCount, class C>
__device__ void sum_over_block(C (&sums)[kCount], C* shared) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sums[k] += __shfl_xor_sync(~0u, sums[k], distance);
  }
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) shared[warp * kCount + k] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    sums[k] = shared[k];
    for (int w = 1; w < warps; ++w) sums[k] += shared[w * kCount + k];
  }
}

// Shift, scale or gate, whose rows the kernel reads in the dtype M.
template <class M>
struct ModulationRows {
  const M* data;   // (B, D)
  int64_t stride;  // elements from a row to the next, 0 if all samples share one

  ModulationRows(const Modulation& modulation)
      : data(modulation.data.as<const M>()), stride(modulation.stride) {}
  __device__ const M* operator[](int sample) const { return data + sample * stride; }
  bool is_aligned() const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * sizeof(M) % 16 == 0;
  }
};

// Calls body(type of x, type of y, type of the modulation). y has the dtype of x, or one of the two
// is float. The modulation has the dtype of both, or the one in which the kernel computes.
template <class Body>
void with_adaln_types(const AdalnTypes& types, Body body) {
  with_types(types.x, types.y, [&](auto x, auto y) {
    using T = typename decltype(x)::type;
    using C = Compute<T>;
    if constexpr (!std::is_same_v<T, C>) {
      if (types.modulation == DType::float32) return body(x, y, Type<C>{});
    }
    if constexpr (std::is_same_v<decltype(x), decltype(y)> || std::is_same_v<T, C>) {
      if (types.modulation == types.x) return body(x, y, x);
    }
    throw std::runtime_error("msf: no kernel for these three dtypes side by side");
  });
}

// Calls body(kVector, kItems, threads) with vectors of 16 bytes where the addresses allow them, and
// with as few of them a thread as let kMaxThreads threads cover a row.
template <class T, class Body>
void with_channels(int channels, bool aligned, Body body) {
  auto fits = [&](auto vector, auto items) {
    const int a_warp = kWarp * vector.value * items.value;
    const int threads = (channels + a_warp - 1) / a_warp * kWarp;
    if (threads <= kMaxThreads) body(vector, items, threads);
    return threads <= kMaxThreads;
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  constexpr int kVector = 16 / sizeof(T);
  if constexpr (sizeof(T) < 8) {
    using Whole = std::integral_constant<int, kVector>;
    if (aligned && channels % kVector == 0) {
      if (fits(Whole{}, One{}) || fits(Whole{}, Two{})) return;
      if constexpr (kVector == 4) {
        if (fits(Whole{}, Four{})) return;
      }
    }
  }
  if (fits(One{}, Four{})) return;
  throw std::runtime_error("msf: too many channels for a block");
}

}  // namespace msf
