// Neighbouring elements of 16 bits in registers, two in each.
#pragma once

#include "../cuda.hpp"

namespace msf {

// Two floats as neighbouring 16-bit elements, the first in the low half.
template <class T>
__device__ uint32_t pack(float low, float high) {
  const Vector<T, 2> pair{{from_compute<T>(low), from_compute<T>(high)}};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// N neighbouring elements, read and written as Vector does, that stay as they lie in memory until
// one is asked for. As elements, those of 16 bits would take a register each from the load on.
template <class T, int N>
struct Packed {
  using Word = std::conditional_t<N * sizeof(T) % 4 == 0, uint32_t, uint16_t>;
  static constexpr int kWords = N * sizeof(T) / sizeof(Word);
  Vector<Word, kWords> words;

  __device__ static Packed load(const T* address) {
    return {Vector<Word, kWords>::load(reinterpret_cast<const Word*>(address))};
  }
  __device__ void store(T* address) const { words.store(reinterpret_cast<Word*>(address)); }

  __device__ Compute<T> operator[](int i) const {
    T element;
    if constexpr (sizeof(T) < sizeof(Word)) {
      const auto bits = uint16_t(words[i / 2] >> 16 * (i % 2));
      memcpy(&element, &bits, sizeof element);
    } else {
      memcpy(&element, &words[i * kWords / N], sizeof element);
    }
    return to_compute(element);
  }

  // Rounds the numbers that value(i) returns.
  template <class Value>
  __device__ static Packed of(const Value& value) {
    Packed packed;
    if constexpr (sizeof(T) < sizeof(Word)) {
#pragma unroll
      for (int i = 0; i < N; i += 2) packed.words[i / 2] = pack<T>(value(i), value(i + 1));
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T element = from_compute<T>(value(i));
        memcpy(&packed.words[i * kWords / N], &element, sizeof element);
      }
    }
    return packed;
  }
};

}  // namespace msf
