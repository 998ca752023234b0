// The parts that the adaLN kernels share. A team of threads takes a slice of one sample's tokens,
// and a thread the same channels of each token: so it reads them once, and sums over tokens in
// registers.
#pragma once

#include "adaln.hpp"
#include "dispatch.cuh"
#include "launch.cuh"
#include "parameter.cuh"

namespace msf {

// The longest rows take teams of 512 threads. An SM just has room for them at a budget of 128
// registers a thread.
constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / kWarp;

inline int slices(const TokenSlices& size) { return (size.tokens + size.length - 1) / size.length; }

// A slice is the tokens [first, end), counted over all samples. Blocks are (samples, slices), in
// which threadIdx.y counts the teams of a block, each with a slice of its own.
struct Slice {
  int sample;
  int64_t first, end;

  __device__ explicit Slice(const TokenSlices& size) : sample(blockIdx.x) {
    const int64_t begin = int64_t(blockIdx.y * blockDim.y + threadIdx.y) * size.length;
    const int64_t left = size.tokens - begin;  // none for the last teams of the last block
    first = int64_t(sample) * size.tokens + begin;
    end = first + (left < size.length ? left : size.length);
  }
};

// A thread has kItems vectors of kVector channels; those before `count` exist. The team is a warp
// or, with kWhole, the block.
template <int kVector, int kItems, bool kWhole>
struct Channels {
  int count;

  // Calls body(item, first channel of it) for each vector that exists.
  template <class Body>
  __device__ void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int team = kWhole ? blockDim.x : kWarp;
      const int channel = (i * team + int(threadIdx.x)) * kVector;
      if (channel < count) body(i, channel);
    }
  }

  // Loads what exists of the rows before `end`, from `row` on. The others stay as they are.
  template <class X, int kRows>
  __device__ void load(Packed<X, kVector> (&x)[kRows][kItems], const X* rows, int64_t row,
                       int64_t end) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= end) continue;
      each([&](int i, int c) { x[r][i] = x[r][i].load(rows + (row + r) * count + c); });
    }
  }
};

// Replaces each of kCount numbers by its sum over the team, with the same bits in every thread:
// first over the lanes of a warp by shuffles, then over the warps in their order. `shared` has room
// for kCount numbers a warp of a block. Its threads must meet at a barrier between two uses of the
// same memory.
template <bool kWhole, int kCount, class C>
__device__ void sum_over_team(C (&sums)[kCount], C* shared) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sums[k] += __shfl_xor_sync(~0u, sums[k], distance);
  }
  if constexpr (!kWhole) return;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
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

// A way to deal a row's vectors: kItems to each thread of a warp or, with kWhole, of a block.
template <int kItemCount, bool kWholeBlock>
struct Deal {
  static constexpr int kItems = kItemCount;
  static constexpr bool kWhole = kWholeBlock;
};

// Calls body(kVector, deal, threads) for the first of the deals that a row fits, with vectors of
// 16 bytes where the addresses allow them, else of single channels, four to a thread.
template <class T, class... Deals, class Body>
void with_channels(int channels, bool aligned, Body body) {
  auto fits = [&](auto vector, auto deal) {
    const int a_warp = kWarp * vector.value * deal.kItems;
    const int threads = (channels + a_warp - 1) / a_warp * kWarp;
    if (threads > (deal.kWhole ? kMaxThreads : kWarp)) return false;
    body(vector, deal, threads);
    return true;
  };
  if constexpr (sizeof(T) < 8) {
    using Whole = std::integral_constant<int, 16 / sizeof(T)>;
    if (aligned && channels % Whole::value == 0 && (fits(Whole{}, Deals{}) || ...)) return;
  }
  if (fits(std::integral_constant<int, 1>{}, Deal<4, true>{})) return;
  throw std::runtime_error("msf: too many channels for a block");
}

}  // namespace msf
