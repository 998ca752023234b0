// Copies from global to shared memory that a thread starts and waits for later: cp.async.
#pragma once

#include "launch.cuh"

namespace msf {

#if defined(__CUDACC__)

// Starts to copy 16 bytes, or to write 16 zeros where the source does not exist. They pass L1 by.
__device__ inline void copy_async(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}

// Ends a group: the copies started since the last one.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all of this thread's groups but the newest kPending have arrived. Other threads see
// them after a barrier.
template <int kPending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

inline void copy_async(void* to, const void* from, bool exists,
                       emulation::Site site = emulation::here("copy_async")) {
  emulation::copy_async(to, from, exists, site);
}

inline void commit_copies() { emulation::commit_copies(); }

template <int kPending>
void wait_copies() {
  emulation::wait_copies(kPending);
}

#endif

}  // namespace msf
