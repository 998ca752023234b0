// From run-time dtypes and flags to template arguments.
#pragma once

#include "../cuda.hpp"
#include "../launchers.hpp"

namespace msf {

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the element type of `dtype`.
template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float64: return body(Type<double>{});
    case DType::float32: return body(Type<float>{});
    case DType::bfloat16: return body(Type<__nv_bfloat16>{});
    case DType::float16: return body(Type<__half>{});
  }
  throw std::runtime_error("msf: unknown dtype");
}

// Calls body(Type<T>{}, Type<U>{}) for a tensor beside another: of one type, or float with 16 bits.
template <class Body>
void with_types(DType dtype, DType other, Body body) {
  with_type(dtype, [&](auto type) {
    if (dtype == other) return body(type, type);
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      if (other == DType::float32) return body(type, Type<float>{});
    } else if constexpr (sizeof(T) == 4) {
      if (other == DType::bfloat16) return body(type, Type<__nv_bfloat16>{});
      if (other == DType::float16) return body(type, Type<__half>{});
    }
    throw std::runtime_error("msf: no kernel for these two dtypes side by side");
  });
}

// Calls body(std::true_type{}) or body(std::false_type{}).
template <class Body>
void with_flag(bool flag, Body body) {
  if (flag) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

inline cudaStream_t cuda_stream(Address stream) { return static_cast<cudaStream_t>(stream.value); }

constexpr int kWarp = 32;
constexpr unsigned kThreads = 256;

// Blocks of kThreads for so many threads.
inline unsigned blocks(int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); }

__device__ inline float reciprocal_root(float x) { return rsqrtf(x); }
__device__ inline double reciprocal_root(double x) { return rsqrt(x); }

__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// A second grid dimension of at most 65,535 blocks, over which the kernel loops.
inline unsigned grid_rows(int64_t rows) { return unsigned(rows < 65535 ? rows : 65535); }

inline bool is_aligned(std::initializer_list<Address> addresses) {
  for (const Address& address : addresses) {
    if (reinterpret_cast<uintptr_t>(address.value) % 16 != 0) return false;
  }
  return true;
}

}  // namespace msf
