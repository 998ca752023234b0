// A toy kernel, rows to zero mean and unit variance, in which -DBUG=name plants a bug.
#pragma once

#include "cuda.hpp"

#ifndef BUG
#define BUG none
#endif

namespace planted {

enum class Bug {
  none,
  missing_barrier,
  missing_barrier_before_reuse,
  missing_syncwarp,
  small_shared_array,
  row_past_the_end,
  divergent_barrier,
  race_between_blocks,
};
constexpr Bug kBug = Bug::BUG;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// The sum over the block: within each warp by shuffles, of the warps' sums by a tree in `partial`.
__device__ inline float block_sum(float value, float* partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  if (kBug != Bug::missing_barrier_before_reuse) __syncthreads();  // the last sum has been read
  if (lane == 0) partial[warp] = value;
  if (kBug != Bug::missing_barrier) __syncthreads();
  if (warp == 0) {
    for (int distance = kWarps / 2; distance > 0; distance /= 2) {
      if (lane < distance) partial[lane] += partial[lane + distance];
      if (kBug != Bug::missing_syncwarp) __syncwarp();
    }
  }
  __syncthreads();
  return partial[0];
}

// x, y (rows, columns), rows_begun (rows,); one block a row, `columns` floats of dynamic shared
// memory.
__global__ void normalize_rows(const float* x, float* y, int* rows_begun, int columns) {
  MSF_SHARED(float, partial, kBug == Bug::small_shared_array ? kWarps / 2 : kWarps);
  MSF_DYNAMIC_SHARED(float, row);
  const size_t past = kBug == Bug::row_past_the_end ? 1 : 0;
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    row[i] = x[(blockIdx.x + past) * columns + i];
    sum += row[i];
  }
  const float mean = block_sum(sum, partial) / columns;

  if (threadIdx.x == 0) {
    rows_begun[kBug == Bug::race_between_blocks ? 0 : blockIdx.x] += 1;
  }

  float squares = 0;
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    squares += (row[i] - mean) * (row[i] - mean);
  }
  if (kBug != Bug::divergent_barrier || threadIdx.x < kThreads / 2) {
    squares = block_sum(squares, partial);
  }
  const float scale = rsqrtf(squares / columns);
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    y[size_t(blockIdx.x) * columns + i] = (row[i] - mean) * scale;
  }
}

inline void launch_normalize_rows(const float* x, float* y, int* rows_begun, int rows, int columns,
                                  cudaStream_t stream) {
  msf::launch<normalize_rows>(dim3(rows), dim3(kThreads), columns * sizeof(float), stream, x, y,
                              rows_begun, columns);
}

}  // namespace planted
