// __half and __nv_bfloat16: storage and conversions, rounded to nearest even. A NaN becomes the one
// that CUDA makes, 0x7fff; which one PyTorch makes depends on the CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "intrinsics.hpp"

struct alignas(2) __half {
  uint16_t bits;
};

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};

namespace msf::emulation {

// Drops the low bits of a float; a carry out of the significand goes into the exponent.
inline uint32_t round_to_even(uint32_t float_bits, int dropped) {
  const uint32_t half = 1u << (dropped - 1);
  return (float_bits + half - 1 + (float_bits >> dropped & 1)) >> dropped;
}

}  // namespace msf::emulation

inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(uint32_t(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16(float value) {
  if (std::isnan(value)) return {0x7fff};
  return {uint16_t(msf::emulation::round_to_even(__float_as_uint(value), 16))};
}

inline float __half2float(__half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t exponent = value.bits >> 10 & 31, significand = value.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(significand ? 0x7fffffff : sign | 0x7f800000);
  if (exponent == 0) return std::copysign(significand * 0x1p-24f, __uint_as_float(sign));
  return __uint_as_float(sign | (exponent + 127 - 15) << 23 | significand << 13);
}

inline __half __float2half(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = bits >> 16 & 0x8000;
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // from 65520 on: infinity
  if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24, which rounding finds
    return {uint16_t(sign | uint16_t(std::nearbyint(std::fabs(value) * 0x1p24f)))};
  }
  return {uint16_t(sign | msf::emulation::round_to_even(magnitude - ((127 - 15) << 23), 13))};
}
