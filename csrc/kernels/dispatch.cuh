// Run-time dtypes and flags become template arguments here.
#pragma once

#include "../cuda.hpp"
#include "../types.hpp"

namespace msf {

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<__half>{}). The sanitizers of the tests build without: half lies in memory as
// bfloat16 does.
template <class Body>
void with_half(Body body) {
#ifdef MSF_NO_HALF
  throw std::runtime_error("msf: built without float16");
#else
  body(Type<__half>{});
#endif
}

// Calls body(Type<T>{}) with the element type of `dtype`.
template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float64: return body(Type<double>{});
    case DType::float32: return body(Type<float>{});
    case DType::bfloat16: return body(Type<__nv_bfloat16>{});
    case DType::float16: return with_half(body);
  }
  throw std::runtime_error("msf: unknown dtype");
}

// Calls body(Type<T>{}, Type<U>{}) for two tensors that a kernel reads side by side: both have the
// same type, or one has 16 bits and the other is float.
template <class Body>
void with_types(DType dtype, DType other, Body body) {
  with_type(dtype, [&](auto type) {
    if (dtype == other) return body(type, type);
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      if (other == DType::float32) return body(type, Type<float>{});
    } else if constexpr (sizeof(T) == 4) {
      if (other == DType::bfloat16) return body(type, Type<__nv_bfloat16>{});
      if (other == DType::float16) return with_half([&](auto half) { body(type, half); });
    }
    throw std::runtime_error("msf: no kernel for these two dtypes side by side");
  });
}

// Calls body(Type<T>{}) with the 16-bit type that `dtype` is.
template <class Body>
void with_16_bits(DType dtype, Body body) {
  switch (dtype) {
    case DType::bfloat16: return body(Type<__nv_bfloat16>{});
    case DType::float16: return with_half(body);
    default: throw std::runtime_error("msf: the kernel takes 16-bit types only");
  }
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

}  // namespace msf
