// One small kernel a built-in: each thread writes what it got. test_emulation.py knows the answers.
#pragma once

#include "cuda.hpp"

namespace builtins {

constexpr unsigned kAll = 0xffffffffu;

// The thread's place in a grid of any shape, counted in the order of CUDA: x fastest.
__device__ inline size_t flat_thread() {
  const size_t block = blockIdx.x + size_t(gridDim.x) * (blockIdx.y + gridDim.y * blockIdx.z);
  const size_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  return block * (blockDim.x * blockDim.y * blockDim.z) + thread;
}

// out (threads, 12)
__global__ void indices(int* out) {
  int* mine = out + 12 * flat_thread();
  const dim3 all[4] = {threadIdx, blockIdx, blockDim, gridDim};
  for (int i = 0; i < 4; ++i) {
    mine[3 * i] = all[i].x;
    mine[3 * i + 1] = all[i].y;
    mine[3 * i + 2] = all[i].z;
  }
}

// out (4, 32): what each shuffle reads when every lane offers its number, in segments of `width`.
__global__ void shuffles(int* out, const int* argument, const int* width) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(kAll, lane, *argument, *width);
  out[32 + lane] = __shfl_up_sync(kAll, lane, *argument, *width);
  out[64 + lane] = __shfl_down_sync(kAll, lane, *argument, *width);
  out[96 + lane] = __shfl_xor_sync(kAll, lane, *argument, *width);
}

// The sum over each warp, of doubles: 8 bytes travel as well as 4.
__global__ void warp_sums(double* values) {
  double sum = values[threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  values[threadIdx.x] = sum;
}

// The block's values in reverse order, through shared memory, three times.
__global__ void reverse(float* values) {
  MSF_DYNAMIC_SHARED(float, shared);
  const int other = blockDim.x - 1 - threadIdx.x;
  for (int i = 0; i < 3; ++i) {
    shared[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    values[threadIdx.x] = shared[other];
    __syncthreads();
  }
}

// Each lane's left neighbour in its warp, through shared memory.
__global__ void rotate_warp(int* out) {
  MSF_SHARED(int, shared, 32);
  shared[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = shared[(threadIdx.x + 31) % 32];
}

template <class T>
__device__ inline T& shared_value() {
  MSF_SHARED(T, value, 1);
  return value[0];
}

// out (blocks, 4): shared memory as a block finds it; then it writes to it, for the next block.
__global__ void unwritten_shared(float* out) {
  MSF_SHARED(float, fixed, 8);
  MSF_DYNAMIC_SHARED(__nv_bfloat16, dynamic);
  out[4 * blockIdx.x] = fixed[7];
  out[4 * blockIdx.x + 1] = msf::to_compute(dynamic[3]);
  out[4 * blockIdx.x + 2] = shared_value<float>();
  out[4 * blockIdx.x + 3] = float(shared_value<int>());
  fixed[7] = 0;
  dynamic[3] = msf::from_compute<__nv_bfloat16>(0);
  shared_value<float>() = 0;
  shared_value<int>() = 0;
}

// Each thread's turn between its start and the barrier, and after it.
__global__ void turns(int* counter, int* first, int* second) {
  first[flat_thread()] = (*counter)++;
  __syncthreads();
  second[flat_thread()] = (*counter)++;
}

// in (4): a, b, c, d; out (3)
template <class T>
__global__ void arithmetic(const T* in, T* out) {
  const T a = in[0], b = in[1], c = in[2], d = in[3];
  out[0] = a * b + c;
  out[1] = std::fma(a, b, c);
  out[2] = msf::reciprocal_root(d);
}

// Four neighbours at once. in, out (4)
__global__ void vectors(const float* in, float* out) {
  auto four = msf::Vector<float, 4>::load(in);
  four[0] += 1;
  four.store(out);
}

template <class T>
__global__ void widen(const T* in, float* out) {
  out[flat_thread()] = msf::to_compute(in[flat_thread()]);
}

template <class T>
__global__ void narrow(const float* in, T* out) {
  out[flat_thread()] = msf::from_compute<T>(in[flat_thread()]);
}

static_assert(alignof(msf::Vector<float, 4>) == 16 && sizeof(msf::Vector<float, 4>) == 16);
static_assert(alignof(msf::Vector<__half, 8>) == 16 && sizeof(msf::Vector<__half, 8>) == 16);
static_assert(alignof(msf::Vector<double, 4>) == 16 && sizeof(msf::Vector<double, 4>) == 32);
static_assert(alignof(msf::Vector<__half, 2>) == 4 && sizeof(msf::Vector<__half, 2>) == 4);

}  // namespace builtins
