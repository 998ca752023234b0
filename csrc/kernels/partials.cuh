// The second pass of a sum over blocks. Each block leaves its partial sum in memory, and this
// kernel adds them up in a fixed order: unlike atomics it gives the same bits at each run.
#pragma once

#include "launch.cuh"

namespace msf {

template <class C>
struct PartialSums {
  const C* partials;  // (rows, parts, channels)
  Address sums;       // (rows, channels), of `dtype`
  DType dtype = DType::float32;
  int rows = 0;  // 0: nothing is asked for
  int64_t parts = 0;
};

// As many threads share a channel as their parts keep busy. Sums of many parts are of few rows: 32
// threads read 32 parts at the same time where a grid of blocks alone would not fill the GPU.
constexpr int kFewGroups = 8, kManyGroups = 32, kManyParts = 16;

template <class C>
__device__ void store_sum(const PartialSums<C>& a, int64_t at, C sum) {
  const Address sums = a.sums;
  switch (a.dtype) {
    case DType::float64: sums.as<double>()[at] = sum; return;
    case DType::float32: sums.as<float>()[at] = float(sum); return;
    case DType::bfloat16: sums.as<__nv_bfloat16>()[at] = from_compute<__nv_bfloat16>(sum); return;
    case DType::float16: sums.as<__half>()[at] = from_compute<__half>(sum); return;
  }
}

// Sums `partials` over their parts, for up to four tensors in one launch. kGroups threads share a
// channel: the i-th adds up the parts i, i + kGroups, ..., then the first adds up the groups.
// Blocks are (kWarp channels, rows, tensors), threads (channels, groups).
// registers: 64
template <class C, int kGroups>
__global__ void sum_partials_kernel(int channels, PartialSums<C> first, PartialSums<C> second,
                                    PartialSums<C> third, PartialSums<C> fourth) {
  MSF_SHARED(C, shared, kGroups * kWarp);
  const int tensor = blockIdx.z;
  const PartialSums<C> a = tensor == 0   ? first
                           : tensor == 1 ? second
                           : tensor == 2 ? third
                                         : fourth;
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
      store_sum(a, row * channels + channel, sum);
    }
    __syncthreads();
  }
}

template <int kGroups, class C>
void sum_partials_of(int channels, PartialSums<C> (&&sums)[4], Address stream) {
  int rows = 0;
  for (PartialSums<C>& a : sums) {
    if ((a.parts > kManyParts) != (kGroups == kManyGroups)) a = {};
    rows = a.rows > rows ? a.rows : rows;
  }
  if (rows == 0) return;
  const dim3 grid((channels + kWarp - 1) / kWarp, grid_rows(rows), 4);
  launch<sum_partials_kernel<C, kGroups>>(grid, dim3(kWarp, kGroups), 0, cuda_stream(stream),
                                          channels, sums[0], sums[1], sums[2], sums[3]);
}

// Sums up to four tensors of partial sums with as many channels.
template <class C>
void sum_partials(int channels, const PartialSums<C> (&sums)[4], Address stream) {
  sum_partials_of<kFewGroups, C>(channels, {sums[0], sums[1], sums[2], sums[3]}, stream);
  sum_partials_of<kManyGroups, C>(channels, {sums[0], sums[1], sums[2], sums[3]}, stream);
}

}  // namespace msf
