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

// out (threads, 3): votes of the lanes that exist, where the last warp of the block is not full.
__global__ void votes(int* out) {
  const unsigned first = threadIdx.x / 32 * 32, lanes = min(32u, blockDim.x - first);
  const unsigned mask = lanes == 32 ? kAll : (1u << lanes) - 1;
  int* mine = out + 3 * threadIdx.x;
  mine[0] = int(__ballot_sync(mask, threadIdx.x % 3 == 0));
  mine[1] = __any_sync(mask, threadIdx.x == 33);
  mine[2] = __all_sync(mask, threadIdx.x != 33);
}

// Two halves of a warp, each a collective of its own at the same line.
__global__ void half_warps(int* out) {
  const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  out[threadIdx.x] = int(__ballot_sync(mask, threadIdx.x % 2));
}

// out (threads, 3)
__global__ void block_votes(int* out) {
  int* mine = out + 3 * threadIdx.x;
  mine[0] = __syncthreads_count(threadIdx.x % 5 == 0);
  mine[1] = __syncthreads_or(threadIdx.x == 7);
  mine[2] = __syncthreads_or(false);
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
  first[flat_thread()] = atomicAdd(counter, 1);
  __syncthreads();
  second[flat_thread()] = atomicAdd(counter, 1);
}

__global__ void count(unsigned* counter, int* old) { old[flat_thread()] = atomicAdd(counter, 1u); }

// The last block to arrive sums what all blocks wrote.
__global__ void last_block(int* partial, unsigned* arrived, int* total) {
  partial[blockIdx.x] = blockIdx.x + 1;
  __threadfence();
  if (atomicAdd(arrived, 1u) + 1 < gridDim.x) return;
  __threadfence();
  for (unsigned i = 0; i < gridDim.x; ++i) *total += __ldg(partial + i);
}

// in (4): a, b, c, d; out (7)
__global__ void float_arithmetic(const float* in, float* out) {
  const float a = in[0], b = in[1], c = in[2], d = in[3];
  out[0] = __fadd_rn(a, b);
  out[1] = __fsub_rn(a, c);
  out[2] = __fmul_rn(a, b);
  out[3] = __fadd_rn(__fmul_rn(a, b), c);
  out[4] = __fmaf_rn(a, b, c);
  out[5] = fmaf(a, b, c);
  out[6] = rsqrtf(d);
}

__global__ void double_arithmetic(const double* in, double* out) {
  const double a = in[0], b = in[1], c = in[2], d = in[3];
  out[0] = __dadd_rn(a, b);
  out[1] = __dsub_rn(a, c);
  out[2] = __dmul_rn(a, b);
  out[3] = __dadd_rn(__dmul_rn(a, b), c);
  out[4] = __fma_rn(a, b, c);
  out[5] = fma(a, b, c);
  out[6] = rsqrt(d);
}

// Four neighbours at once, and two: the vectors of CUDA and ours. in, out (10)
__global__ void float_vectors(const float* in, float* out) {
  auto four = msf::Vector<float, 4>::load(in);
  four[0] += 1;
  four.store(out);
  const float4 next = *reinterpret_cast<const float4*>(in + 4);
  *reinterpret_cast<float4*>(out + 4) = make_float4(next.w, next.z, next.y, next.x);
  const float2 last = *reinterpret_cast<const float2*>(in + 8);
  *reinterpret_cast<float2*>(out + 8) = make_float2(last.y, last.x);
}

// out (12)
__global__ void integer_vectors(int* out) {
  *reinterpret_cast<int4*>(out) = make_int4(-1, 2, -3, 4);
  *reinterpret_cast<uint4*>(out + 4) = make_uint4(5, 6, 7, 8);
  *reinterpret_cast<int2*>(out + 8) = make_int2(min(-9, 9), max(-9, 9));
  *reinterpret_cast<uint2*>(out + 10) = make_uint2(min(9u, 10u), max(9u, 10u));
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
