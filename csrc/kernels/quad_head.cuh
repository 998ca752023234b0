// A head of 16-bit elements in the registers of a quad: four neighbouring lanes.
//
// In the operand of a product lane t of a quad has the columns 8 j + 2 t and 8 j + 2 t + 1 of every
// 8. A score is a sum over channels in any order, so where q and k are prepared their columns hold
// other channels than their own, the same ones in both: those for which the pairs (i, i + d / 2)
// that RoPE rotates lie in one lane, and which it reads in accesses of up to 16 bytes.
#pragma once

#include "heads.cuh"
#include "tensor_cores.cuh"

namespace msf {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The sum of what is in the same lane of all quads of the warp.
__device__ inline float sum_over_quads(float x) {
#pragma unroll
  for (int distance = 4; distance < kWarp; distance *= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The quads of a block, each with a head, and which lane this thread is: Lanes for four of them.
struct Quads {
  int group = 0, lane = 0;

  __device__ Quads mine() const { return {int(threadIdx.x % kWarp / 4), int(threadIdx.x % 4)}; }
  __device__ bool idle() const { return false; }
  __device__ int64_t head() const { return threadIdx.x / 4; }
  __host__ __device__ int64_t heads() const { return kThreads / 4; }
  __device__ float sum(float value) const { return quad_sum(value); }
};

// What one lane of a quad holds of a head of kDim channels: kSize of the first half and the same
// of the second. They are a run of up to 8 and what is left of its share: at 72 channels lane 1 has
// 8 to 15 and 33 of the first half, 44 to 51 and 69 of the second.
template <int kDim>
struct QuadHead {
  using Lanes = Quads;
  static_assert(kDim % 8 == 0 && (kDim <= 64 || kDim % 16 == 0 || kDim == 72));
  static constexpr int kHalf = kDim / 2, kSize = kHalf / 4, kWords = kDim / 8;
  static constexpr int kRun = kSize < 8 ? kSize : 8, kRest = kSize - kRun;
  float first[kSize] = {}, second[kSize] = {};

  static Lanes lanes(int) { return {}; }

  template <class T>
  __device__ void load(const T* head, const Lanes& lanes) {
    if constexpr (std::is_same_v<T, float>) {
      load_angles(head, head + kHalf, lanes);
    } else {
      uint32_t words[kWords];
      load_words(words, head, lanes.lane);
      unpack<T>(words);
    }
  }

  template <class T>
  __device__ void store(T* head, const Lanes& lanes) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        head[channel(i, lanes.lane)] = first[i];
        head[kHalf + channel(i, lanes.lane)] = second[i];
      }
    } else {
      uint32_t words[kWords];
      pack_into<T>(words);
      store_words(words, head, lanes.lane);
    }
  }

  __device__ void subtract(float value, const Lanes&) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      first[i] -= value;
      second[i] -= value;
    }
  }

  __device__ void load_angles(const float* cos, const float* sin, const Lanes& lanes) {
    load_half(first, cos, lanes.lane);
    load_half(second, sin, lanes.lane);
  }

  // Reads the lane's 16-bit channels as they are: the runs of both halves, then the rests.
  template <class T>
  __device__ static void load_words(uint32_t (&words)[kWords], const T* head, int lane) {
    for_each_vector(head, lane, [&](int word, const T* from, auto count) {
      const auto* pairs = reinterpret_cast<const uint32_t*>(from);
      const auto vector = Vector<uint32_t, count.value>::load(pairs);
#pragma unroll
      for (int k = 0; k < count.value; ++k) words[word + k] = vector[k];
    });
    if constexpr (kRest == 1) {
      const T* rest = head + 4 * kRun + lane;
      const Vector<T, 2> pair{{rest[0], rest[kHalf]}};
      memcpy(&words[kWords - 1], &pair, sizeof pair);
    }
  }

  template <class T>
  __device__ static void store_words(const uint32_t (&words)[kWords], T* head, int lane) {
    for_each_vector(head, lane, [&](int word, T* to, auto count) {
      Vector<uint32_t, count.value> vector;
#pragma unroll
      for (int k = 0; k < count.value; ++k) vector[k] = words[word + k];
      vector.store(reinterpret_cast<uint32_t*>(to));
    });
    if constexpr (kRest == 1) {
      T* rest = head + 4 * kRun + lane;
      Vector<T, 2> pair;
      memcpy(&pair, &words[kWords - 1], sizeof pair);
      rest[0] = pair[0];
      rest[kHalf] = pair[1];
    }
  }

  template <class T>
  __device__ void unpack(const uint32_t (&words)[kWords]) {
    for_each_word([&](int word, float& low, float& high) {
      Vector<T, 2> pair;
      memcpy(&pair, &words[word], sizeof pair);
      low = to_compute(pair[0]);
      high = to_compute(pair[1]);
    });
  }

  template <class T>
  __device__ void pack_into(uint32_t (&words)[kWords]) {
    for_each_word([&](int word, float low, float high) { words[word] = pack<T>(low, high); });
  }

  // Takes row `lower` of the sums of a product.
  __device__ void take(const float (&sums)[kWords][4], int lower) {
    for_each_word([&](int word, float& low, float& high) {
      low = sums[word][2 * lower];
      high = sums[word][2 * lower + 1];
    });
  }

  // Adds up what is in the same place of all quads of the warp that have a head, into `sums` (d,).
  __device__ void add_to(float* sums, int lane, bool exists) const {
#pragma unroll
    for (int i = 0; i < 2 * kSize; ++i) {
      const float value = i < kSize ? first[i] : second[i - kSize];
      const float sum = sum_over_quads(exists ? value : 0);
      if (threadIdx.x % kWarp < 4) sums[i / kSize * kHalf + channel(i % kSize, lane)] += sum;
    }
  }

 private:
  // The channel of the first half that is element i of this lane.
  __device__ static int channel(int i, int lane) {
    return i < kRun ? kRun * lane + i : 4 * kRun + kRest * lane + i - kRun;
  }

  // Calls body(word, low, high) with the two channels of each word.
  template <class Body>
  __device__ void for_each_word(Body body) {
#pragma unroll
    for (int i = 0; i < kRun / 2; ++i) {
      body(i, first[2 * i], first[2 * i + 1]);
      body(kRun / 2 + i, second[2 * i], second[2 * i + 1]);
    }
#pragma unroll
    for (int i = 0; i < kRest / 2; ++i) {
      body(kRun + i, first[kRun + 2 * i], first[kRun + 2 * i + 1]);
      body(kRun + kRest / 2 + i, second[kRun + 2 * i], second[kRun + 2 * i + 1]);
    }
    if constexpr (kRest == 1) body(kWords - 1, first[kRun], second[kRun]);
  }

  // Calls body(word, address, number of words) with the runs and the rests of more than a channel,
  // in accesses of at most 16 bytes.
  template <class T, class Body>
  __device__ static void for_each_vector(T* head, int lane, Body body) {
    // Half of 72 channels is 8 bytes off a multiple of 16.
    constexpr int kVector = kHalf % 8 && kRun > 4 ? 2 : kRun / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kRun / 2; i += kVector) {
        body(half * kRun / 2 + i, head + half * kHalf + kRun * lane + 2 * i,
             std::integral_constant<int, kVector>{});
      }
      if constexpr (kRest > 1) {
        body(kRun + half * kRest / 2, head + half * kHalf + 4 * kRun + kRest * lane,
             std::integral_constant<int, kRest / 2>{});
      }
    }
  }

  __device__ static void load_half(float* to, const float* half, int lane) {
    load_run<kRun>(to, half + kRun * lane);
    if constexpr (kRest > 0) load_run<kRest>(to + kRun, half + 4 * kRun + kRest * lane);
  }

  template <int kCount>
  __device__ static void load_run(float* to, const float* from) {
    constexpr int kVector = kCount < 4 ? kCount : 4;
#pragma unroll
    for (int i = 0; i < kCount; i += kVector) {
      const auto vector = Vector<float, kVector>::load(from + i);
#pragma unroll
      for (int k = 0; k < kVector; ++k) to[i + k] = vector[k];
    }
  }
};

// Calls body(std::integral_constant<int, d>{}) if d is a head_dim that quads are built for, or
// returns false.
template <class Body>
bool with_head_dim(int dim, Body body) {
  auto call = [&](auto built) {
    body(built);
    return true;
  };
  switch (dim) {
    case 32: return call(std::integral_constant<int, 32>{});
    case 64: return call(std::integral_constant<int, 64>{});
    case 72: return call(std::integral_constant<int, 72>{});
    case 80: return call(std::integral_constant<int, 80>{});
    case 96: return call(std::integral_constant<int, 96>{});
    case 128: return call(std::integral_constant<int, 128>{});
    default: return false;
  }
}

}  // namespace msf
