// The second pass of a sum over blocks. Each block leaves its partial sum in memory, and this
// kernel adds them up in a fixed order: unlike atomics it gives the same bits at each run.
#pragma once

#include "launch.cuh"

namespace msf {

template <class C>
struct PartialSums {
  const C* partials;             // (rows, parts, channels)
  Address sums;                  // (rows, channels), of `dtype`
  DType dtype = DType::float32;  // float32, or T of sum_partials
  int rows = 0;                  // 0: nothing is asked for
  int64_t parts = 0;
};

// Sums `partials` over their parts, for up to three tensors in one launch. kGroups threads share a
// channel: the i-th adds up the parts i, i + kGroups, ..., then the first adds up the groups.
// Blocks are (kWarp channels, rows, tensors), threads (channels, groups).
// registers: 96
template <class T, int kGroups>
__global__ void sum_partials_kernel(int channels, PartialSums<Compute<T>> first,
                                    PartialSums<Compute<T>> second, PartialSums<Compute<T>> third) {
  using C = Compute<T>;
  MSF_SHARED(C, shared, kGroups * kWarp);
  const PartialSums<C> a = blockIdx.z == 0 ? first : blockIdx.z == 1 ? second : third;
  const int64_t channel = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    C sum = 0;
    if (channel < channels) {
      for (int64_t part = threadIdx.y; part < a.parts; part += kGroups) {
        sum += a.partials[(row * a.parts + part) * channels + channel];
      }
    }
    shared[threadIdx.y * kWarp + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && channel < channels) {
      for (int group = 1; group < kGroups; ++group) sum += shared[group * kWarp + threadIdx.x];
      const int64_t at = row * channels + channel;
      const Address sums = a.sums;
      if (a.dtype == DType::float32) {
        sums.as<float>()[at] = sum;
      } else {
        sums.as<T>()[at] = from_compute<T>(sum);
      }
    }
    __syncthreads();
  }
}

// max_rows is the largest `rows` of the three.
template <class T, int kGroups>
void sum_partials(int channels, int max_rows, const PartialSums<Compute<T>> (&sums)[3],
                  Address stream) {
  const dim3 grid((channels + kWarp - 1) / kWarp, grid_rows(max_rows), 3);
  launch<sum_partials_kernel<T, kGroups>>(grid, dim3(kWarp, kGroups), 0, cuda_stream(stream),
                                          channels, sums[0], sums[1], sums[2]);
}

}  // namespace msf
