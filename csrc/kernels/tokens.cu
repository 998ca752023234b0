// merge_tokens and its gradient. The equations are in msf_kernels/tokens/reference.py.
#include "dispatch.cuh"
#include "launch.cuh"
#include "tokens.hpp"

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

// Returns the first elements of a sample.
template <class T>
__device__ const T* sample(const TokensView& tokens, int64_t b) {
  return tokens.data.as<const T>() + b * tokens.batch;
}

// Blocks are (vectors of a sample of x, samples); `size` is the number of elements of a sample's
// fine tokens, 4 * h * w * D, `before` that of its condition, C * D.
// registers: 96
template <class T, class P, int kVector>
__global__ void merge_tokens_kernel(TokenGrid grid, int64_t size, int64_t before,
                                    TokensView base,       // (B, h * w, 4 * D)
                                    TokensView skip,       // (B, 4 * h * w, D)
                                    const P* position,     // (4 * h * w, D) or absent
                                    TokensView condition,  // (B, C, D) or absent
                                    T* x) {                // (B, C + 4 * h * w, D)
  const int64_t place = thread_index() * kVector;
  if (place < before) {
    for (int64_t b = blockIdx.y; b < grid.batch; b += gridDim.y) {
      Vector<T, kVector>::load(sample<T>(condition, b) + place)
          .store(x + b * (before + size) + place);
    }
    return;
  }
  const int64_t index = thread_index() - before / kVector;
  if (index * kVector >= size) return;
  const int64_t coarse = coarse_offset<kVector>(grid, index);
  Vector<P, kVector> position_vector{};
  if (position) position_vector = position_vector.load(position + index * kVector);
  for (int64_t b = blockIdx.y; b < grid.batch; b += gridDim.y) {
    const auto base_vector = Vector<T, kVector>::load(sample<T>(base, b) + coarse);
    const auto skip_vector = Vector<T, kVector>::load(sample<T>(skip, b) + index * kVector);
    Vector<T, kVector> sum;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      Compute<T> value = to_compute(base_vector[k]) + to_compute(skip_vector[k]);
      if (position) value += to_compute(position_vector[k]);
      sum[k] = from_compute<T>(value);
    }
    sum.store(x + b * (before + size) + place);
  }
}

// registers: 96
template <class T, int kVector>
__global__ void merge_tokens_backward_kernel(TokenGrid grid, int64_t size,
                                             TokensView grad,  // (B, 4 * h * w, D)
                                             T* grad_base) {   // (B, h * w, 4 * D)
  const int64_t index = thread_index();
  if (index * kVector >= size) return;
  const int64_t coarse = coarse_offset<kVector>(grid, index);
  for (int64_t b = blockIdx.y; b < grid.batch; b += gridDim.y) {
    Vector<T, kVector>::load(sample<T>(grad, b) + index * kVector)
        .store(grad_base + b * size + coarse);
  }
}

// Sums over the batch in the order of the samples, so that it repeats bit for bit.
// registers: 96
template <class T, class P, int kVector>
__global__ void sum_over_batch_kernel(TokenGrid grid, int64_t size,
                                      TokensView grad,     // (B, 4 * h * w, D)
                                      P* grad_position) {  // (4 * h * w, D)
  const int64_t first = thread_index() * kVector;
  if (first >= size) return;
  Compute<T> sums[kVector] = {};
  for (int64_t b = 0; b < grid.batch; ++b) {
    const auto part = Vector<T, kVector>::load(sample<T>(grad, b) + first);
#pragma unroll
    for (int k = 0; k < kVector; ++k) sums[k] += to_compute(part[k]);
  }
  Vector<P, kVector> total;
#pragma unroll
  for (int k = 0; k < kVector; ++k) total[k] = from_compute<P>(sums[k]);
  total.store(grad_position + first);
}

// Calls body(type, type of position, vector size); the size is 1 where D, an address or the stride
// of a batch is no multiple of 16 bytes.
template <class Body>
void with_tokens(DType dtype, DType position_dtype, const TokenGrid& grid,
                 std::initializer_list<TokensView> tokens, Body body) {
  with_types(dtype, position_dtype, [&](auto type, auto position) {
    constexpr int kVector = 16 / sizeof(typename decltype(type)::type);
    bool aligned = grid.channels % kVector == 0;
    for (const TokensView& view : tokens) {
      aligned = aligned && is_aligned({view.data}) && view.batch % kVector == 0;
    }
    with_flag(aligned, [&](auto flag) {
      body(type, position, std::integral_constant<int, (decltype(flag)::value ? kVector : 1)>{});
    });
  });
}

}  // namespace

void merge_tokens(DType dtype, DType position_dtype, TokenGrid grid, TokensView base,
                  TokensView skip, Address position, TokensView condition, int condition_tokens,
                  Address x, Address stream) {
  const int64_t size = int64_t(4) * grid.height * grid.width * grid.channels;
  const int64_t before = int64_t(condition_tokens) * grid.channels;
  if (grid.batch == 0 || size == 0) return;
  const auto tokens = {base, skip, condition, TokensView{position}, TokensView{x}};
  with_tokens(dtype, position_dtype, grid, tokens, [&](auto type, auto other, auto vector) {
    using T = typename decltype(type)::type;
    using P = typename decltype(other)::type;
    launch<merge_tokens_kernel<T, P, vector.value>>(
        dim3(blocks((before + size) / vector.value), grid_rows(grid.batch)), dim3(kThreads), 0,
        cuda_stream(stream), grid, size, before, base, skip, position.as<const P>(), condition,
        x.as<T>());
  });
}

void merge_tokens_backward(DType dtype, DType position_dtype, TokenGrid grid, TokensView grad,
                           Address grad_base, Address grad_position, Address stream) {
  const int64_t size = int64_t(4) * grid.height * grid.width * grid.channels;
  if (size == 0) return;
  const auto tokens = {grad, TokensView{grad_base}, TokensView{grad_position}};
  with_tokens(dtype, position_dtype, grid, tokens, [&](auto type, auto other, auto vector) {
    using T = typename decltype(type)::type;
    using P = typename decltype(other)::type;
    const unsigned x = blocks(size / vector.value);
    if (grid.batch > 0) {
      launch<merge_tokens_backward_kernel<T, vector.value>>(dim3(x, grid_rows(grid.batch)),
                                                            dim3(kThreads), 0, cuda_stream(stream),
                                                            grid, size, grad, grad_base.as<T>());
    }
    if (grad_position) {
      launch<sum_over_batch_kernel<T, P, vector.value>>(
          dim3(x), dim3(kThreads), 0, cuda_stream(stream), grid, size, grad, grad_position.as<P>());
    }
  });
}

}  // namespace msf
