// One small kernel a built-in: each thread writes what it got. test_emulation.py knows the answers.
#pragma once

#include "kernels/async_copy.cuh"
#include "kernels/tensor_cores.cuh"

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

// Whether any value of the warp is not 0.
__global__ void any_of_warp(int* values) {
  values[threadIdx.x] = __any_sync(kAll, values[threadIdx.x]);
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

// Loads the matrices (4, 8, 8) into the registers (32 lanes, 7): four, two and one of them at once.
template <bool kTransposed>
__global__ void load_matrices(const uint16_t* matrices, uint32_t* registers) {
  MSF_SHARED(uint16_t, shared, 4 * 8 * 8);
  for (int i = 0; i < 8; ++i) shared[8 * threadIdx.x + i] = matrices[8 * threadIdx.x + i];
  __syncwarp();
  uint32_t four[4], two[2], one[1];
  msf::load_matrices<kTransposed>(four, &shared[8 * threadIdx.x]);
  msf::load_matrices<kTransposed>(two, &shared[8 * threadIdx.x]);
  msf::load_matrices<kTransposed>(one, &shared[8 * threadIdx.x]);
  uint32_t* mine = registers + 7 * threadIdx.x;
  for (int i = 0; i < 4; ++i) mine[i] = four[i];
  for (int i = 0; i < 2; ++i) mine[4 + i] = two[i];
  mine[6] = one[0];
}

// Adds the product of a and b to c. All are registers of 32 lanes: (32, depth / 4), (32, depth / 8)
// and (32, 4).
template <class T, int kDepth>
__global__ void multiply_matrices(const uint32_t* a, const uint32_t* b, float* c) {
  uint32_t mine_a[kDepth / 4], mine_b[kDepth / 8];
  float mine_c[4];
  for (int i = 0; i < kDepth / 4; ++i) mine_a[i] = a[threadIdx.x * kDepth / 4 + i];
  for (int i = 0; i < kDepth / 8; ++i) mine_b[i] = b[threadIdx.x * kDepth / 8 + i];
  for (int i = 0; i < 4; ++i) mine_c[i] = c[threadIdx.x * 4 + i];
  msf::multiply_matrices<T, kDepth>(mine_c, mine_a, mine_b);
  for (int i = 0; i < 4; ++i) c[threadIdx.x * 4 + i] = mine_c[i];
}

// seen (threads, 3, 4): what is at the place of a thread's copy right after its start, when all
// groups but the newest have arrived, and at the end. Thread 3's first source does not exist.
__global__ void copies(const float* from, float* seen) {
  MSF_DYNAMIC_SHARED(float, shared);  // (2, threads, 4)
  const unsigned i = threadIdx.x, count = blockDim.x;
  auto look = [&](int when, const float* at) {
    for (int k = 0; k < 4; ++k) seen[(3 * i + when) * 4 + k] = at[k];
  };
  float* first = shared + 4 * i;
  float* second = shared + 4 * (count + i);
  msf::copy_async(first, from + 4 * i, i != 3);
  msf::commit_copies();
  look(0, first);
  msf::copy_async(second, from + 4 * (count + i), true);
  msf::commit_copies();
  msf::wait_copies<1>();
  look(1, first);
  msf::wait_copies<0>();
  look(2, second);
}

}  // namespace builtins
