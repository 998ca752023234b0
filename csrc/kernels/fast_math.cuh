// What the special function unit of a GPU gives in one instruction, 16 a cycle on each SM.
#pragma once

#include "../cuda.hpp"

namespace msf {

#if defined(__CUDACC__)

// 2^x to 2 units in the last place.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 unit in the last place; 0 where that is subnormal.
__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }

#endif

}  // namespace msf
