// The built-in functions of CUDA that the kernels use. Those that wait take the line of their
// caller as a default argument, for the reports.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "synchronization.hpp"

inline void __syncthreads(msf::emulation::Site site = msf::emulation::here("__syncthreads")) {
  msf::emulation::block_barrier(site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       msf::emulation::Site site = msf::emulation::here("__syncwarp")) {
  msf::emulation::warp_barrier(mask, site);
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

inline int __any_sync(unsigned mask, int predicate,
                      msf::emulation::Site site = msf::emulation::here("__any_sync")) {
  auto any = [mask](unsigned, msf::emulation::Lanes<int> predicates) {
    for (unsigned lane = 0; lane < msf::emulation::kWarp; ++lane) {
      if (mask >> lane & 1 && *predicates[lane]) return 1;
    }
    return 0;
  };
  return msf::emulation::collective<int>(mask, site, predicate, any);
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
