// The block barrier and the warp collectives.
#pragma once

#include <string>
#include <utility>

#include "scheduler.hpp"

namespace msf::emulation {

// Counts the threads whose `vote` is true. Every thread of the block must come, as the CUDA guide
// asks: today's GPUs do not wait for threads that have returned, here that is a deadlock.
inline unsigned block_barrier(bool vote, Site site) {
  Quiet quiet;
  Barrier& barrier = current->barrier;
  Clock& clock = barrier.clocks[barrier.generation % 2];
  if (barrier.arrived && barrier.site != site) {
    fail("barrier divergence: " + describe(site) + " while others wait in " +
         describe(barrier.site));
  }
  clock.release();
  barrier.site = self->site = site;
  barrier.votes += vote;
  if (++barrier.arrived == current->threads.size()) {
    barrier.arrived = 0;
    barrier.result = std::exchange(barrier.votes, 0);
    ++barrier.generation;
    for (Thread& thread : current->threads) current->ready.push(&thread);
  }
  wait_for_turn();
  clock.acquire();
  return barrier.result;
}

// The collective that the running lane joins, begun by it if it is the first to arrive.
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

// What each lane of a warp brought; nullptr for lanes outside the mask.
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

// What `value` is in lane `source`. Orders no memory, as on the device.
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

// A bit for each lane whose `vote` is true.
inline unsigned ballot(unsigned mask, bool vote, Site site) {
  auto count = [](unsigned, Lanes<bool> votes) {
    unsigned bits = 0;
    for (unsigned l = 0; l < kWarp; ++l) bits |= unsigned(votes[l] && *votes[l]) << l;
    return bits;
  };
  return collective<unsigned>(mask, site, vote, count);
}

inline void warp_barrier(unsigned mask, Site site) {
  collective<bool>(mask, site, true, [](unsigned, Lanes<bool>) { return true; }, true);
}

}  // namespace msf::emulation
