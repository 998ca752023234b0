// What launchers are given. A launcher is declared in kernels/<op>.hpp and defined beside its
// kernels in kernels/<op>.cu; it starts them on `stream`, and throws std::runtime_error if they
// cannot start. bindings.cpp offers them all to Python.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MSF_HOST_DEVICE __host__ __device__
#else
#define MSF_HOST_DEVICE
#endif

namespace msf {

// The address of data on the GPU, or of a stream.
struct Address {
  void* value = nullptr;

  template <class T>
  MSF_HOST_DEVICE T* as() const {
    return static_cast<T*>(value);
  }
  MSF_HOST_DEVICE explicit operator bool() const { return value != nullptr; }
};

enum class DType { float64, float32, bfloat16, float16 };

// A bias or norm weight, or its gradient, in the dtype of what it belongs to or float32. An absent
// one has no data.
struct Parameter {
  Address data;
  DType dtype = DType::float32;
};

}  // namespace msf
