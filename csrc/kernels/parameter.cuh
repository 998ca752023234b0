// Biases and norm weights, which lie in a tensor's dtype or in float.
#pragma once

#include "../types.hpp"
#include "packed.cuh"

namespace msf {

// Returns kVector channels of a parameter, in T or float, from c on; zeros for an absent one.
template <class T, int kVector>
__device__ Vector<Compute<T>, kVector> load_parameter(const Parameter& parameter, int c) {
  Vector<Compute<T>, kVector> wide = {};
  auto load = [&](const auto* data) {
    const auto narrow = Packed<std::decay_t<decltype(*data)>, kVector>::load(data + c);
#pragma unroll
    for (int k = 0; k < kVector; ++k) wide[k] = narrow[k];
  };
  if (!parameter.data) return wide;
  if (parameter.dtype == DType::float32) {
    load(parameter.data.as<const float>());
  } else {
    load(parameter.data.as<const T>());
  }
  return wide;
}

}  // namespace msf
