// What a warp does with small matrices: ldmatrix and mma.sync, for bfloat16 and half.
//
// Lane l holds of row l / 4 of an 8 x 8 matrix the columns 2 (l % 4) and the next, in one register.
// Larger operands are such matrices side by side, first over their rows, then over the depth.
#pragma once

#include "fast_math.cuh"
#include "launch.cuh"
#include "packed.cuh"

namespace msf {

#if defined(__CUDACC__)

// Loads one, two or four matrices from shared memory, each into a register. Lane l gives the
// address of row l % 8 of matrix l / 8, a multiple of 16; those of further lanes are not used.
template <bool kTransposed = false, int kMatrices>
__device__ void load_matrices(uint32_t (&to)[kMatrices], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#define MSF_LDMATRIX(shape, registers, ...)                                         \
  if constexpr (kTransposed) {                                                      \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".trans.shared.b16 " registers \
                 : __VA_ARGS__                                                      \
                 : "r"(address)                                                     \
                 : "memory");                                                       \
  } else {                                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".shared.b16 " registers       \
                 : __VA_ARGS__                                                      \
                 : "r"(address)                                                     \
                 : "memory");                                                       \
  }
  if constexpr (kMatrices == 4) {
    MSF_LDMATRIX("x4", "{%0, %1, %2, %3}, [%4];", "=r"(to[0]), "=r"(to[1]), "=r"(to[2]),
                 "=r"(to[3]))
  } else if constexpr (kMatrices == 2) {
    MSF_LDMATRIX("x2", "{%0, %1}, [%2];", "=r"(to[0]), "=r"(to[1]))
  } else {
    static_assert(kMatrices == 1);
    MSF_LDMATRIX("x1", "{%0}, [%1];", "=r"(to[0]))
  }
#undef MSF_LDMATRIX
}

// c (16 x 8) += a (16 x kDepth) b (kDepth x 8). c is float, and a lane holds two columns of its
// rows l / 4 and l / 4 + 8; b is stored by columns.
template <class T, int kDepth>
__device__ void multiply_matrices(float (&c)[4], const uint32_t (&a)[kDepth / 4],
                                  const uint32_t (&b)[kDepth / 8]) {
#define MSF_MMA(type)                                                                      \
  if constexpr (kDepth == 16) {                                                            \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                             \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[kDepth / 4 - 2]), "r"(a[kDepth / 4 - 1]), "r"(b[0]), \
          "r"(b[kDepth / 8 - 1]));                                                         \
  } else {                                                                                 \
    static_assert(kDepth == 8);                                                            \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type                              \
        ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                         \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                   \
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));                                                \
  }
  if constexpr (std::is_same_v<T, __half>) {
    MSF_MMA("f16")
  } else {
    MSF_MMA("bf16")
  }
#undef MSF_MMA
}

#else

template <bool kTransposed = false, int kMatrices>
void load_matrices(uint32_t (&to)[kMatrices], const void* row,
                   emulation::Site site = emulation::here("load_matrices")) {
  emulation::load_matrices(to, row, kTransposed, site);
}

template <class T, int kDepth>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[kDepth / 4],
                       const uint32_t (&b)[kDepth / 8],
                       emulation::Site site = emulation::here("multiply_matrices")) {
  emulation::multiply_matrices<T, kDepth>(c, a, b, site);
}

#endif

}  // namespace msf
