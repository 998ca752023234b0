// Shared memory: fresh for every block, of exactly the size asked for, so that ASan sees an access
// out of bounds, and full of 0xFF, which reads as NaN in every float format and as -1 in int.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <string>

#include "block.hpp"

namespace msf::emulation {

constexpr size_t kSharedLimit = 227 << 10;      // what a block gets on sm_90 and sm_100 if it asks
constexpr size_t kPlainSharedLimit = 48 << 10;  // what it gets if it does not

// The memory that `key` stands for in the running block; the first thread to ask makes it.
inline void* shared_memory(const void* key, size_t bytes) {
  Quiet quiet;
  for (const SharedArray& array : current->shared) {
    if (array.key == key) return array.bytes.get();
  }
  current->shared_bytes += bytes;
  // A launch asks for more where its dynamic part alone exceeds what every block gets.
  const bool asks = current->launch.shared_bytes > kPlainSharedLimit;
  const size_t limit = asks ? kSharedLimit : kPlainSharedLimit;
  if (current->shared_bytes > limit) {
    fail(std::to_string(current->shared_bytes) + " bytes of shared memory, at most " +
         std::to_string(limit));
  }
  std::unique_ptr<unsigned char[]> fresh(new unsigned char[bytes]);
  std::memset(fresh.get(), 0xFF, bytes);
  return current->shared.emplace_back(SharedArray{key, std::move(fresh)}).bytes.get();
}

template <class Array>
Array& shared_array(const void* key) {
  return *static_cast<Array*>(shared_memory(key, sizeof(Array)));
}

template <class T>
T* dynamic_shared_memory() {
  return static_cast<T*>(shared_memory(&current->launch, current->launch.shared_bytes));
}

}  // namespace msf::emulation
