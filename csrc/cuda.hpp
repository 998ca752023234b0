// CUDA for the kernels: the real one under nvcc, the emulation under g++.
//
// Kernels include this file only, start through msf::launch and declare shared memory with
// MSF_SHARED and MSF_DYNAMIC_SHARED; so the same source runs on a GPU and in tests without one.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "recording.hpp"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Declares an array of n elements that the block shares, aligned to 16 bytes for vector accesses.
#define MSF_SHARED(T, name, n) __shared__ __align__(16) T name[n]

// Declares T* name, the shared memory of the size given at the launch, aligned to 16 bytes.
#define MSF_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char msf_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(msf_dynamic_shared)

#else

#include "emulation/cuda_emulation.hpp"

#define MSF_SHARED(T, name, n)      \
  static const char name##_key = 0; \
  T(&name)[n] = ::msf::emulation::shared_array<T[n]>(&name##_key)

#define MSF_DYNAMIC_SHARED(T, name) T* const name = ::msf::emulation::dynamic_shared_memory<T>()

#endif

namespace msf {

inline std::runtime_error launch_error(dim3 grid, dim3 block, size_t shared_bytes,
                                       const std::string& reason) {
  auto shape = [](dim3 d) {
    return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z);
  };
  return std::runtime_error("msf: kernel launch (grid " + shape(grid) + ", block " + shape(block) +
                            ", " + std::to_string(shared_bytes) +
                            " bytes of shared memory) failed: " + reason);
}

// The dynamic shared memory that every kernel may have without asking for it.
constexpr size_t kPlainSharedBytes = 48 << 10;

// Starts kernel<<<grid, block, shared_bytes, stream>>>(args...), as launch<kernel> does, where the
// kernel is known at run time only.
template <class Kernel, class... Args>
void start(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
           Args... args) {
#if defined(__CUDACC__)
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kPlainSharedBytes) {
    // Raised and never lowered: a graph may hold a launch that takes more.
    cudaFuncAttributes limits{};
    error = cudaFuncGetAttributes(&limits, kernel);
    if (error == cudaSuccess && size_t(limits.maxDynamicSharedSizeBytes) < shared_bytes) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(shared_bytes));
    }
  }
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, stream>>>(args...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    throw launch_error(grid, block, shared_bytes, cudaGetErrorString(error));
  }
#else
  static_cast<void>(stream);
  try {
    emulation::launch(kernel, grid, block, shared_bytes, args...);
  } catch (const std::exception& error) {
    throw launch_error(grid, block, shared_bytes, error.what());
  }
#endif
}

template <auto kKernel>
const char* name_of() {
  return __PRETTY_FUNCTION__;
}

// Starts kKernel<<<grid, block, shared_bytes, stream>>>(args...). Throws std::runtime_error if it
// cannot start; errors while it runs on a GPU show at a later call, those of the emulation here.
template <auto kKernel, class... Args>
void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
  if (recorded_launches) {
    recorded_launches->push_back(
        {name_of<kKernel>(), {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes});
  } else {
    start(kKernel, grid, block, shared_bytes, stream, args...);
  }
}

// Kernels compute in double where the tensors are double, and in float everywhere else.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

__host__ __device__ inline float to_compute(float value) { return value; }
__host__ __device__ inline double to_compute(double value) { return value; }
__host__ __device__ inline float to_compute(__half value) { return __half2float(value); }
__host__ __device__ inline float to_compute(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds a result to the tensor's type, to nearest even.
template <class T>
__host__ __device__ inline T from_compute(Compute<T> value) {
  return value;
}
template <>
__host__ __device__ inline __half from_compute<__half>(float value) {
  return __float2half(value);
}
template <>
__host__ __device__ inline __nv_bfloat16 from_compute<__nv_bfloat16>(float value) {
  return __float2bfloat16(value);
}

__device__ inline float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

__device__ inline float reciprocal_root(float x) { return rsqrtf(x); }
__device__ inline double reciprocal_root(double x) { return rsqrt(x); }

// N neighbouring elements, which are read and written in accesses of 16 bytes, or of their whole
// size if that is less. The address must be a multiple of the size of an access.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  static_assert((N & (N - 1)) == 0, "a vector has 1, 2, 4, 8 ... elements");
  T elements[N];

  __host__ __device__ T& operator[](int i) { return elements[i]; }
  __host__ __device__ const T& operator[](int i) const { return elements[i]; }

  __host__ __device__ static Vector load(const T* address) {
    return *reinterpret_cast<const Vector*>(address);
  }
  __host__ __device__ void store(T* address) const { *reinterpret_cast<Vector*>(address) = *this; }
};

}  // namespace msf
