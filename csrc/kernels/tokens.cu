// merge_tokens and its gradient. The equations are in msf_kernels/tokens/reference.py.
#include "dispatch.cuh"
#include "launch.cuh"

namespace msf {
namespace {

// Returns the offset in base of the index-th vector of a sample's fine tokens.
template <int kVector>
__device__ int64_t coarse_offset(const TokenGrid& grid, int64_t index) {
  const int vectors = grid.channels / kVector;
  const int64_t token = index / vectors, channel = index % vectors * kVector;
  const int width = 2 * grid.width;
  const int row = token / width, column = token % width;
  const int64_t coarse = int64_t(row / 2) * grid.width + column / 2;
  const int quarter = row % 2 * 2 + column % 2;
  return (coarse * 4 + quarter) * grid.channels + channel;
}

// Blocks are (vectors of a sample's fine tokens, samples); `size` is the number of elements of a
// sample, 4 * h * w * D.
// registers: 96
template <class T, class P, int kVector>
__global__ void merge_tokens_kernel(TokenGrid grid, int64_t size,
                                    const T* base,      // (B, h * w, 4 * D)
                                    const T* skip,      // (B, 4 * h * w, D)
                                    const P* position,  // (4 * h * w, D) or absent
                                    T* x) {             // (B, 4 * h * w, D)
  const int64_t index = thread_index();
  if (index * kVector >= size) return;
  const int64_t coarse = coarse_offset<kVector>(grid, index);
  Vector<P, kVector> position_vector{};
  if (position) position_vector = position_vector.load(position + index * kVector);
  for (int64_t b = blockIdx.y; b < grid.batch; b += gridDim.y) {
    const auto base_vector = Vector<T, kVector>::load(base + b * size + coarse);
    const auto skip_vector = Vector<T, kVector>::load(skip + b * size + index * kVector);
    Vector<T, kVector> sum;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      Compute<T> value = to_compute(base_vector[k]) + to_compute(skip_vector[k]);
      if (position) value += to_compute(position_vector[k]);
      sum[k] = from_compute<T>(value);
    }
    sum.store(x + b * size + index * kVector);
  }
}

// registers: 96
template <class T, int kVector>
__global__ void merge_tokens_backward_kernel(TokenGrid grid, int64_t size,
                                             const T* grad,   // (B, 4 * h * w, D)
                                             T* grad_base) {  // (B, h * w, 4 * D)
  const int64_t index = thread_index();
  if (index * kVector >= size) return;
  const int64_t coarse = coarse_offset<kVector>(grid, index);
  for (int64_t b = blockIdx.y; b < grid.batch; b += gridDim.y) {
    Vector<T, kVector>::load(grad + b * size + index * kVector)
        .store(grad_base + b * size + coarse);
  }
}

// Sums over the batch in the order of the samples, so that it repeats bit for bit.
// registers: 96
template <class T, class P, int kVector>
__global__ void sum_over_batch_kernel(TokenGrid grid, int64_t size,
                                      const T* grad,       // (B, 4 * h * w, D)
                                      P* grad_position) {  // (4 * h * w, D)
  const int64_t first = thread_index() * kVector;
  if (first >= size) return;
  Compute<T> sums[kVector] = {};
  for (int64_t b = 0; b < grid.batch; ++b) {
    const auto part = Vector<T, kVector>::load(grad + b * size + first);
#pragma unroll
    for (int k = 0; k < kVector; ++k) sums[k] += to_compute(part[k]);
  }
  Vector<P, kVector> total;
#pragma unroll
  for (int k = 0; k < kVector; ++k) total[k] = from_compute<P>(sums[k]);
  total.store(grad_position + first);
}

// Calls body(type, type of position, vector size); the size is 1 where D or an address is no
// multiple of 16 bytes.
template <class Body>
void with_tokens(DType dtype, DType position_dtype, const TokenGrid& grid,
                 std::initializer_list<Address> addresses, Body body) {
  with_types(dtype, position_dtype, [&](auto type, auto position) {
    constexpr int kVector = 16 / sizeof(typename decltype(type)::type);
    with_flag(grid.channels % kVector == 0 && is_aligned(addresses), [&](auto flag) {
      body(type, position, std::integral_constant<int, (decltype(flag)::value ? kVector : 1)>{});
    });
  });
}

}  // namespace

void merge_tokens(DType dtype, DType position_dtype, TokenGrid grid, Address base, Address skip,
                  Address position, Address x, Address stream) {
  const int64_t size = int64_t(4) * grid.height * grid.width * grid.channels;
  if (grid.batch == 0 || size == 0) return;
  const auto addresses = {base, skip, position, x};
  with_tokens(dtype, position_dtype, grid, addresses, [&](auto type, auto other, auto vector) {
    using T = typename decltype(type)::type;
    using P = typename decltype(other)::type;
    launch<merge_tokens_kernel<T, P, vector.value>>(
        dim3(blocks(size / vector.value), grid_rows(grid.batch)), dim3(kThreads), 0,
        cuda_stream(stream), grid, size, base.as<const T>(), skip.as<const T>(),
        position.as<const P>(), x.as<T>());
  });
}

void merge_tokens_backward(DType dtype, DType position_dtype, TokenGrid grid, Address grad,
                           Address grad_base, Address grad_position, Address stream) {
  const int64_t size = int64_t(4) * grid.height * grid.width * grid.channels;
  if (size == 0) return;
  const auto addresses = {grad, grad_base, grad_position};
  with_tokens(dtype, position_dtype, grid, addresses, [&](auto type, auto other, auto vector) {
    using T = typename decltype(type)::type;
    using P = typename decltype(other)::type;
    const unsigned x = blocks(size / vector.value);
    if (grid.batch > 0) {
      launch<merge_tokens_backward_kernel<T, vector.value>>(
          dim3(x, grid_rows(grid.batch)), dim3(kThreads), 0, cuda_stream(stream), grid, size,
          grad.as<const T>(), grad_base.as<T>());
    }
    if (grad_position) {
      launch<sum_over_batch_kernel<T, P, vector.value>>(dim3(x), dim3(kThreads), 0,
                                                        cuda_stream(stream), grid, size,
                                                        grad.as<const T>(), grad_position.as<P>());
    }
  });
}

}  // namespace msf
