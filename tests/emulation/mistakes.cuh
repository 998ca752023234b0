// Kernels that must fail, each with one mistake. test_mistakes.py knows what is said of them.
#pragma once

#include "kernels/async_copy.cuh"
#include "kernels/tensor_cores.cuh"

namespace mistakes {

constexpr unsigned kAll = 0xffffffffu;

__global__ void barrier_that_some_skip() {
  if (threadIdx.x >= 8) __syncthreads();
}

__global__ void deadlock_at_two_places() {
  if (threadIdx.y == 1 && threadIdx.x != 5) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void two_barriers_that_meet() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void two_collectives_that_meet() {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __shfl_sync(kAll, 0, 0);
  }
}

__global__ void caller_outside_mask() { __shfl_sync(0xfffffff7u, 0, 0); }

__global__ void lanes_that_do_not_exist() { __shfl_sync(kAll, 0, 0); }

__global__ void lane_that_has_returned() {
  if (threadIdx.x == 0) return;
  __shfl_sync(kAll, 0, 0);
}

__global__ void lane_that_returns_later() {
  if (threadIdx.x == 31) return;
  __shfl_sync(kAll, 0, 0);
}

__global__ void overlapping_masks() { __syncwarp(threadIdx.x < 16 ? 0x0001ffffu : 0xffff0000u); }

__global__ void read_outside_mask() {
  if (threadIdx.x < 16) __shfl_xor_sync(0x0000ffffu, 0, 16);
}

__global__ void copies_that_nobody_waits_for() {
  MSF_SHARED(float, to, 4 * 32);
  msf::copy_async(&to[4 * threadIdx.x], nullptr, false);
  msf::commit_copies();
  msf::wait_copies<1>();
}

__global__ void copy_to_a_misaligned_address() {
  MSF_SHARED(float, to, 8);
  msf::copy_async(&to[1], nullptr, false);
}

__global__ void misaligned_row() {
  MSF_SHARED(float, rows, 40);
  uint32_t matrix[1];
  msf::load_matrices(matrix, &rows[4 * (threadIdx.x % 8) + 2]);
}

__global__ void too_much_shared_memory() {
  MSF_SHARED(float, large, 8192);
  MSF_DYNAMIC_SHARED(float, more);
  large[0] = more[0];
}

struct Counted {
  __device__ explicit Counted(int* count) : count(count) { ++*count; }
  __device__ ~Counted() { --*count; }
  int* count;
};

// count: how many threads are inside.
__global__ void barrier_inside(int* count) {
  Counted inside(count);
  if (threadIdx.x >= 8) __syncthreads();
}

__global__ void nothing() {}

}  // namespace mistakes
