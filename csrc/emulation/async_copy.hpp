// cp.async: copies of 16 bytes from global to shared memory, which a thread starts and waits for.
//
// On the device one may arrive at any time up to its wait. Here its place reads as NaN from its
// start, and the bytes arrive at the wait: so what is read too early, or overwritten while others
// still read it, shows.
#pragma once

#include <cstdint>
#include <cstring>

#include "synchronization.hpp"

namespace msf::emulation {

// Starts a copy, of zeros if the source does not exist.
inline void copy_async(void* to, const void* from, bool exists, Site site) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (exists && reinterpret_cast<uintptr_t>(from) % 16)) {
    fail(describe(site) + ": an address is not a multiple of 16");
  }
  std::memset(to, 0xFF, 16);
  self->copies.push_back({to, exists ? from : nullptr, self->copy_groups});
}

// Ends a group: the copies started since the last one.
inline void commit_copies() { ++self->copy_groups; }

// Returns when all groups of this thread but the newest `pending` have arrived. Others see them
// after a barrier.
inline void wait_copies(unsigned pending) {
  auto& copies = self->copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->group + pending < self->copy_groups; ++copy) {
    copy->from ? std::memcpy(copy->to, copy->from, 16) : std::memset(copy->to, 0, 16);
  }
  copies.erase(copies.begin(), copy);
}

}  // namespace msf::emulation
