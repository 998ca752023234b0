// Runs a kernel over its grid, one block after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "scheduler.hpp"
#include "shared_memory.hpp"

namespace msf::emulation {

// The limits of every GPU since compute capability 3.0, but that of shared memory.
inline void check_configuration(dim3 grid, dim3 block, size_t shared_bytes) {
  auto require = [](const char* what, uint64_t value, uint64_t low, uint64_t high) {
    if (value >= low && value <= high) return;
    throw std::runtime_error("invalid configuration: " + std::string(what) + " is " +
                             std::to_string(value) + ", must be " + std::to_string(low) + " to " +
                             std::to_string(high));
  };
  require("grid.x", grid.x, 1, 0x7fffffff);
  require("grid.y", grid.y, 1, 65535);
  require("grid.z", grid.z, 1, 65535);
  require("block.x", block.x, 1, 1024);
  require("block.y", block.y, 1, 1024);
  require("block.z", block.z, 1, 64);
  require("threads a block", uint64_t(block.x) * block.y * block.z, 1, 1024);
  require("dynamic shared memory", shared_bytes, 0, kSharedLimit);
}

// Returns when the last block has ended. Throws std::runtime_error, one line, at the first error.
template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  check_configuration(grid, block, shared_bytes);
  auto run = [&] { kernel(args...); };
  auto call = [](const void* run_kernel) { (*static_cast<const decltype(run)*>(run_kernel))(); };
  auto launch = std::make_unique<Launch>(
      Launch{block, shared_bytes, Order::from_environment(), call, &run, {}, {}});
  blockDim = block;
  gridDim = grid;
  launch->begin.release();
  std::string error;
  {
    Quiet quiet;
    Queue<uint64_t> blocks(launch->order, ~uint64_t(0));
    const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < count; ++i) blocks.push(i);
    while (!blocks.empty() && error.empty()) {
      const uint64_t i = blocks.pop();
      const uint3 index{unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                        unsigned(i / grid.x / grid.y)};
      error = run_block(*std::make_unique<Block>(*launch, index, i));
    }
  }
  launch->end.acquire();
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace msf::emulation
