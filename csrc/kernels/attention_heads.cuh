// What q and k pass on their way into attention, and how a warp holds them.
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

// What one lane of a quad holds of a head of kDim channels: kShare of the first half and the same
// of the second. They are a run of up to 8 and what is left of its share: at 72 channels lane 1 has
// 8 to 15 and 33 of the first half, 44 to 51 and 69 of the second.
template <int kDim>
struct QuadHead {
  static_assert(kDim % 8 == 0 && (kDim <= 64 || kDim % 16 == 0 || kDim == 72));
  static constexpr int kHalf = kDim / 2, kShare = kHalf / 4, kWords = kDim / 8;
  static constexpr int kRun = kShare < 8 ? kShare : 8, kRest = kShare - kRun;
  float channels[2 * kShare];

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

  // Reads (d / 2) of a weight, or the cosines of a token, and (d / 2) more or the sines.
  __device__ void load(const float* half, const float* other, int lane) {
    load_half(channels, half, lane);
    load_half(channels + kShare, other, lane);
  }

  // Adds up what is in the same place of all lanes that have these channels, into `sums` (d,).
  __device__ void add_to(float* sums, int lane) const {
#pragma unroll
    for (int i = 0; i < 2 * kShare; ++i) {
      float sum = channels[i];
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
      }
      const int at = i % kShare;
      const int channel = at < kRun ? kRun * lane + at : 4 * kRun + kRest * lane + at - kRun;
      if (threadIdx.x % kWarp < 4) sums[i / kShare * kHalf + channel] += sum;
    }
  }

  __device__ float reciprocal_rms(float eps) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * kShare; ++i) sum += channels[i] * channels[i];
    return reciprocal_root(quad_sum(sum) / kDim + eps);
  }

  // Rotates by a token's angles, or back where sign is -1.
  __device__ void rotate(const QuadHead& angles, float sign) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const float cos = angles.channels[i], sin = sign * angles.channels[kShare + i];
      const float x = channels[i], y = channels[kShare + i];
      channels[i] = x * cos - y * sin;
      channels[kShare + i] = y * cos + x * sin;
    }
  }

 private:
  // Calls body(word, low, high) with the two channels of each word.
  template <class Body>
  __device__ void for_each_word(Body body) {
    float *const first = channels, *const second = channels + kShare;
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

// What q and k pass before they are compared: both are read in the order of QuadHead if one of them
// passes something.
struct Preparation {
  NormWeight q_weight, k_weight;  // (d,) or absent
  const float* rope;              // (2, tokens, d / 2) or absent
  int tokens;
  float eps;

  __host__ __device__ explicit operator bool() const {
    return q_weight.data || k_weight.data || rope;
  }

  // Reads the weights into shared memory (2, d), that of q first.
  template <class T>
  __device__ void load_weights(float* to, int dim) const {
    for (int i = threadIdx.x; i < 2 * dim; i += blockDim.x) {
      const NormWeight weight = i < dim ? q_weight : k_weight;
      if (!weight.data) continue;
      const int channel = i % dim;
      to[i] = weight.dtype == DType::float32 ? weight.data.as<const float>()[channel]
                                             : to_compute(weight.data.as<const T>()[channel]);
    }
  }

  // Normalises the words of a token, if there is a weight, rotates them, and rounds once.
  template <class T, int kDim>
  __device__ void apply(uint32_t (&words)[kDim / 8], const float* weight, int token,
                        int lane) const {
    QuadHead<kDim> x, other;
    x.template unpack<T>(words);
    if (weight) {
      other.load(weight, weight + kDim / 2, lane);
      const float rrms = x.reciprocal_rms(eps);
#pragma unroll
      for (int i = 0; i < kDim / 4; ++i) x.channels[i] = x.channels[i] * rrms * other.channels[i];
    }
    if (rope) {
      load_angles(other, token, lane);
      x.rotate(other, 1);
    }
    x.template pack_into<T>(words);
  }

  // Replaces the gradient of what `apply` has made of x by that of x, and x by this token's part of
  // the gradient of the weight.
  template <int kDim>
  __device__ void undo(QuadHead<kDim>& grad, QuadHead<kDim>& x, const float* weight, int token,
                       int lane) const {
    QuadHead<kDim> other;
    if (rope) {
      load_angles(other, token, lane);
      grad.rotate(other, -1);
    }
    if (!weight) return;
    other.load(weight, weight + kDim / 2, lane);
    const float rrms = x.reciprocal_rms(eps);
    float along = 0;
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) {
      x.channels[i] *= rrms;
      along += grad.channels[i] * other.channels[i] * x.channels[i];
    }
    along = quad_sum(along) / kDim;
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) {
      const float normalised = x.channels[i];
      x.channels[i] *= grad.channels[i];
      grad.channels[i] = (grad.channels[i] * other.channels[i] - normalised * along) * rrms;
    }
  }

 private:
  template <int kDim>
  __device__ void load_angles(QuadHead<kDim>& to, int token, int lane) const {
    const float* cos = rope + int64_t(token) * (kDim / 2);
    to.load(cos, cos + int64_t(tokens) * (kDim / 2), lane);
  }
};

}  // namespace msf
