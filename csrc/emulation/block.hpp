// The state of one block: its threads, its barrier, its warps and its shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "language.hpp"
#include "order.hpp"
#include "sanitizers.hpp"

namespace msf::emulation {

constexpr unsigned kWarp = 32;

// The place where a kernel calls something that waits; the reports name it.
struct Site {
  const char* call;
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    auto same = [](const char* a, const char* b) { return a == b || !std::strcmp(a, b); };
    return line == other.line && same(call, other.call) && same(file, other.file);
  }
  bool operator!=(const Site& other) const { return !(*this == other); }
};

// As a default argument this is the site of the call that leaves the argument out.
constexpr Site here(const char* call, const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
  return {call, file, line};
}

// A copy under way (see async_copy.hpp); `from` is nullptr for zeros.
struct AsyncCopy {
  void* to;
  const void* from;
  unsigned group;
};

struct Thread {
  uint3 index{};
  unsigned warp = 0;
  unsigned lane = 0;
  bool done = false;
  Site site{};             // where it waits, if it is not done
  Fiber* fiber = nullptr;  // none before its first turn
  std::vector<AsyncCopy> copies;
  unsigned copy_groups = 0;  // how many have ended
};

struct Barrier {
  unsigned arrived = 0;
  unsigned generation = 0;
  Site site{};
  Clock
      clocks[2];  // used alternately, so that a thread ahead at the next barrier adds no edge here
};

// A warp collective that some of its lanes have reached.
struct Collective {
  unsigned mask = 0;
  unsigned arrived = 0;
  Site site{};
  Clock* clock = nullptr;
  const void* inputs[kWarp] = {};
  void* outputs[kWarp] = {};
};

struct Warp {
  unsigned exists = 0;  // the last warp of a block may have fewer than 32 lanes
  unsigned exited = 0;
  unsigned generation = 0;
  Clock clocks[2];
  std::vector<Collective> pending;
};

struct SharedArray {
  const void* key;
  std::unique_ptr<unsigned char[]> bytes;
};

// A kernel launch, as its blocks see it.
struct Launch {
  dim3 block;
  size_t shared_bytes;
  Order order;
  void (*call)(const void* kernel);
  const void* kernel;
  Clock begin, end;
};

struct Block {
  Block(Launch& launch, uint3 index, uint64_t number);

  Launch& launch;
  uint3 index;
  unsigned alive;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Queue<Thread*> ready;
  Barrier barrier;
  std::vector<SharedArray> shared;
  size_t shared_bytes = 0;
  std::string error;
  Fiber launcher;
};

// The block and the CUDA thread that run now on this thread of the host.
inline thread_local Block* current = nullptr;
inline thread_local Thread* self = nullptr;

inline Block::Block(Launch& launch, uint3 index, uint64_t number)
    : launch(launch),
      index(index),
      alive(launch.block.x * launch.block.y * launch.block.z),
      threads(alive),
      warps((alive + kWarp - 1) / kWarp),
      ready(launch.order, number) {
  for (unsigned i = 0; i < alive; ++i) {
    Thread& thread = threads[i];
    const dim3& shape = launch.block;
    thread.index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    thread.warp = i / kWarp;
    thread.lane = i % kWarp;
    warps[thread.warp].exists |= 1u << thread.lane;
    ready.push(&thread);
  }
}

inline std::string describe(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

inline std::string describe(const Site& site) {
  return std::string(site.call) + " at " + site.file + ":" + std::to_string(site.line);
}

// Ends the launch: the thread's error becomes that of the block.
[[noreturn]] inline void fail(const std::string& reason) { throw std::runtime_error(reason); }

}  // namespace msf::emulation
