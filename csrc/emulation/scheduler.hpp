// Runs the threads of a block in turns on one thread of the host.
//
// A CUDA thread gets a fiber when its first turn comes. If it ends without ever having waited, the
// next new one runs on the same fiber as the next pass of a loop, without a switch: so a kernel
// without barriers and collectives needs one fiber a block.
#pragma once

#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "block.hpp"

namespace msf::emulation {

inline void fiber_main();

// Fibers outlive their blocks: making one costs a system call, and under TSan 1 ms and 0.8 MB.
//
// To TSan a fiber is a thread, and what one fiber does is ordered. So there every CUDA thread has
// its own, and a fiber used in one block rests during the next: if neighbouring blocks shared
// fibers, the order between a fiber's two uses would hide their races.
class FiberPool {
 public:
  Fiber* take() {
    if (free_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(&fiber_main));
      return fibers_.back().get();
    }
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }

  void give_back(Fiber* fiber) { (kTsan ? used_ : free_).push_back(fiber); }

  void end_block() {
    free_.insert(free_.end(), resting_.begin(), resting_.end());
    resting_ = std::exchange(used_, {});
  }

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> free_, used_, resting_;
};

inline thread_local FiberPool pool;

inline Thread* next_thread() { return current->ready.empty() ? nullptr : current->ready.pop(); }

inline void enter(Thread* thread) {
  self = thread;
  threadIdx = thread->index;
}

// Leaves the fiber of the running thread for `thread`, or for the launcher if there is none.
inline void switch_to(Thread* thread, Fiber& from) {
  if (!thread) return from.switch_to(current->launcher);
  if (!thread->fiber) thread->fiber = pool.take();
  enter(thread);
  from.switch_to(*thread->fiber);
}

// Thrown out of the kernel in every thread that still waits when its block has failed.
struct Cancelled {};

// Gives up the turn; returns when someone has made the running thread ready and its turn has come.
inline void wait_for_turn() {
  Thread* me = self;
  Thread* next = next_thread();
  if (next != me) switch_to(next, *me->fiber);
  if (!current->error.empty()) throw Cancelled();
}

inline void leave_warp() {
  Quiet quiet;
  if (!self->copies.empty()) fail("has returned without waiting for its asynchronous copies");
  Warp& warp = current->warps[self->warp];
  warp.exited |= 1u << self->lane;
  for (const Collective& collective : warp.pending) {
    if (collective.mask >> self->lane & 1) {
      fail("has returned while lanes of its warp wait for it in " + describe(collective.site));
    }
  }
}

inline void run_thread() {
  current->launch.begin.acquire();
  try {
    if (current->error.empty()) {
      current->launch.call(current->launch.kernel);
      leave_warp();
    }
  } catch (const Cancelled&) {
  } catch (const std::exception& error) {
    Quiet quiet;
    current->error = "block " + describe(current->index) + " thread " + describe(self->index) +
                     ": " + error.what();
  }
  current->launch.end.release();
}

// Every fiber runs this: one thread after another.
inline void fiber_main() {
  for (;;) {
    run_thread();
    Quiet quiet;
    Fiber* mine = self->fiber;
    self->done = true;
    --current->alive;
    Thread* next = next_thread();
    if (next && !next->fiber && !kTsan) {
      next->fiber = mine;
      enter(next);
    } else {
      pool.give_back(mine);
      switch_to(next, *mine);  // returns when this fiber is taken from the pool for another thread
    }
  }
}

// "deadlock in block (0,0,0): 96 threads wait in __syncthreads at f.cuh:5, first (0,0,0); 32 have
// returned"
inline std::string describe_deadlock() {
  struct Group {
    const Thread* first;
    int count;
  };
  std::vector<Group> groups;  // one for each place where threads wait
  for (const Thread& thread : current->threads) {
    if (thread.done) continue;
    auto same = [&](const Group& group) { return group.first->site == thread.site; };
    auto found = std::find_if(groups.begin(), groups.end(), same);
    if (found == groups.end()) found = groups.insert(found, {&thread, 0});
    ++found->count;
  }
  std::string report = "deadlock in block " + describe(current->index) + ": ";
  for (const Group& group : groups) {
    report += std::to_string(group.count) + " threads wait in " + describe(group.first->site) +
              ", first " + describe(group.first->index) + "; ";
  }
  return report + std::to_string(current->threads.size() - current->alive) + " have returned";
}

// Runs `block` to its end. Returns the error of its first thread that failed, or "".
inline std::string run_block(Block& block) {
  current = &block;
  blockIdx = block.index;
  switch_to(next_thread(), block.launcher);
  if (block.alive) {
    if (block.error.empty()) block.error = describe_deadlock();
    for (Thread& thread : block.threads) {
      if (!thread.done) block.ready.push(&thread);
    }
    switch_to(next_thread(), block.launcher);
  }
  pool.end_block();
  return block.error;
}

}  // namespace msf::emulation
