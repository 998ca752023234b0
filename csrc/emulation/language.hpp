// The CUDA language in g++: keywords, built-in variables and index types. `__shared__` stays
// undefined, because shared memory must come from MSF_SHARED, which is poisoned and bounds-checked.
#pragma once

#define __global__ inline
#define __device__
#define __host__
#define __launch_bounds__(...)

using cudaStream_t = struct CUstream_st*;

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 index) : x(index.x), y(index.y), z(index.z) {}
};

constexpr int warpSize = 32;

// The indices of the CUDA thread that runs now; the scheduler sets them at each switch.
inline thread_local uint3 threadIdx{};
inline thread_local uint3 blockIdx{};
inline thread_local dim3 blockDim{};
inline thread_local dim3 gridDim{};
