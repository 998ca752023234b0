// The built-in functions of CUDA that the kernels use. Those that wait name their caller's line.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "synchronization.hpp"

inline void __syncthreads(msf::emulation::Site site = msf::emulation::here("__syncthreads")) {
  msf::emulation::block_barrier(false, site);
}

inline int __syncthreads_count(
    int vote, msf::emulation::Site site = msf::emulation::here("__syncthreads_count")) {
  return int(msf::emulation::block_barrier(vote != 0, site));
}

inline int __syncthreads_or(int vote,
                            msf::emulation::Site site = msf::emulation::here("__syncthreads_or")) {
  return msf::emulation::block_barrier(vote != 0, site) != 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       msf::emulation::Site site = msf::emulation::here("__syncwarp")) {
  msf::emulation::warp_barrier(mask, site);
}

inline unsigned __ballot_sync(unsigned mask, int vote,
                              msf::emulation::Site site = msf::emulation::here("__ballot_sync")) {
  return msf::emulation::ballot(mask, vote != 0, site);
}

inline int __any_sync(unsigned mask, int vote,
                      msf::emulation::Site site = msf::emulation::here("__any_sync")) {
  return msf::emulation::ballot(mask, vote != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int vote,
                      msf::emulation::Site site = msf::emulation::here("__all_sync")) {
  return msf::emulation::ballot(mask, vote != 0, site) == mask;
}

// The shuffles read a lane of the caller's segment, which is `width` lanes (a power of two), or the
// caller itself where that lane would lie outside.

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              msf::emulation::Site site = msf::emulation::here("__shfl_sync")) {
  const unsigned first = msf::emulation::self->lane & ~(width - 1u);
  return msf::emulation::shuffle(mask, value, first + (unsigned(source) & (width - 1u)), site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 msf::emulation::Site site = msf::emulation::here("__shfl_up_sync")) {
  const unsigned lane = msf::emulation::self->lane, within = lane & (width - 1u);
  return msf::emulation::shuffle(mask, value, delta <= within ? lane - delta : lane, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   msf::emulation::Site site = msf::emulation::here("__shfl_down_sync")) {
  const unsigned lane = msf::emulation::self->lane, within = lane & (width - 1u);
  const unsigned source = within + delta < unsigned(width) ? lane + delta : lane;
  return msf::emulation::shuffle(mask, value, source, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  msf::emulation::Site site = msf::emulation::here("__shfl_xor_sync")) {
  const unsigned lane = msf::emulation::self->lane, last = lane | (width - 1u);
  const unsigned source = lane ^ unsigned(lane_mask);
  return msf::emulation::shuffle(mask, value, source <= last ? source : lane, site);
}

inline int atomicAdd(int* address, int value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// Orders what comes before the fence of one thread before what comes after that of another, which
// is more than CUDA promises without an atomic between them.
inline void __threadfence() {
  msf::emulation::Clock& fence = msf::emulation::current->launch.fence;
  fence.release();
  fence.acquire();
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class Integer>
constexpr std::enable_if_t<std::is_integral_v<Integer>, Integer> min(Integer a, Integer b) {
  return b < a ? b : a;
}
template <class Integer>
constexpr std::enable_if_t<std::is_integral_v<Integer>, Integer> max(Integer a, Integer b) {
  return a < b ? b : a;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

#if !__GLIBC_PREREQ(2, 42)  // which brings its own
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
#endif

// Never contracted to a fused multiply-add, as nvcc does with a * b + c; `build` in
// tests/emulation/build.py forbids g++ to contract at all.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
