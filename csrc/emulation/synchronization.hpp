// The block barrier and the warp collectives.
#pragma once

#include <string>

#include "scheduler.hpp"

namespace msf::emulation {

// Waits for every thread of the block, as the CUDA guide asks: today's GPUs do not wait for threads
// that have returned, here that is a deadlock.
inline void block_barrier(Site site) {
  Quiet quiet;
  Barrier& barrier = current->barrier;
  Clock& clock = barrier.clocks[barrier.generation % 2];
  if (barrier.arrived && barrier.site != site) {
    fail("barrier divergence: " + describe(site) + " while others wait in " +
         describe(barrier.site));
  }
  clock.release();
  barrier.site = self->site = site;
  if (++barrier.arrived == current->threads.size()) {
    barrier.arrived = 0;
    ++barrier.generation;
    for (Thread& thread : current->threads) current->ready.push(&thread);
  }
  wait_for_turn();
  clock.acquire();
}

// Returns the collective that the running lane joins; the first lane to arrive begins it.
inline Collective& join(unsigned mask, Site site) {
  Warp& warp = current->warps[self->warp];
  if (!(mask >> self->lane & 1)) fail(describe(site) + ": the calling lane is not in the mask");
  if (mask & ~warp.exists) fail(describe(site) + ": the mask names lanes that do not exist");
  if (mask & warp.exited) fail(describe(site) + ": the mask names lanes that have returned");
  for (Collective& pending : warp.pending) {
    if (!(pending.mask & mask)) continue;
    if (pending.mask != mask) {
      fail(describe(site) + ": the mask overlaps that of a pending " + describe(pending.site));
    }
    if (pending.site != site) {
      fail("warp divergence: " + describe(site) + " while others wait in " +
           describe(pending.site));
    }
    return pending;
  }
  Collective& begun = warp.pending.emplace_back();
  begun.mask = mask;
  begun.site = site;
  begun.clock = &warp.clocks[warp.generation % 2];
  return begun;
}

// The values that the lanes of a warp brought; nullptr for lanes outside the mask.
template <class T>
struct Lanes {
  const void* const* values;
  const T* operator[](unsigned lane) const { return static_cast<const T*>(values[lane]); }
};

// Lanes wait until all of `mask` have come; the last to arrive computes for all of them: `lane`
// gets compute(lane, Lanes<In>). A fence orders what they did before it before what they do after.
template <class Out, class In, class Compute>
Out collective(unsigned mask, Site site, const In& in, Compute compute, bool fence = false) {
  Quiet quiet;
  Out out{};
  Warp& warp = current->warps[self->warp];
  Collective& joined = join(mask, site);
  Clock& clock = *joined.clock;
  if (fence) clock.release();
  joined.inputs[self->lane] = &in;
  joined.outputs[self->lane] = &out;
  joined.arrived |= 1u << self->lane;
  self->site = site;
  if (joined.arrived == mask) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      *static_cast<Out*>(joined.outputs[lane]) = compute(lane, Lanes<In>{joined.inputs});
      current->ready.push(&current->threads[self->warp * kWarp + lane]);
    }
    ++warp.generation;
    warp.pending.erase(warp.pending.begin() + (&joined - warp.pending.data()));
  }
  wait_for_turn();
  if (fence) clock.acquire();
  return out;
}

// Returns the value of lane `source`. As on the device, it orders no memory.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
  struct Input {
    T value;
    unsigned source;
  };
  auto read = [site](unsigned lane, Lanes<Input> inputs) {
    const unsigned from = inputs[lane]->source;
    if (!inputs[from]) {
      fail(describe(site) + ": lane " + std::to_string(lane) + " reads lane " +
           std::to_string(from) + " outside the mask");
    }
    return inputs[from]->value;
  };
  return collective<T>(mask, site, Input{value, source}, read);
}

inline void warp_barrier(unsigned mask, Site site) {
  collective<bool>(mask, site, true, [](unsigned, Lanes<bool>) { return true; }, true);
}

}  // namespace msf::emulation
