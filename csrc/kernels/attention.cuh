// Heads of attention in the shared memory of a block, and the products of a warp with their rows.
#pragma once

#include "async_copy.cuh"
#include "attention.hpp"
#include "preparation.cuh"

namespace msf {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <class Body>
void with_built_head_dim(int dim, Body body) {
  if (!with_head_dim(dim, body)) throw std::runtime_error("msf: no attention of this head_dim");
}

// Which head of which sample a block works on, and where it lies.
struct HeadIndex {
  int64_t index, sample, head;

  __device__ HeadIndex(unsigned index, int heads)
      : index(index), sample(index / heads), head(index % heads) {}

  template <class T>
  __device__ const T* in(const HeadsView& x) const {
    return x.data.as<const T>() + sample * x.batch + head * x.head;
  }
};

// As many warps, `most` at most, as share so many parts evenly.
inline int even_warps(int parts, int most) {
  const int turns = (parts + most - 1) / most;
  return (parts + turns - 1) / turns;
}

// The rows that hold so many tokens: products take 16 at a time.
__host__ __device__ inline int padded(int tokens) { return (tokens + 15) / 16 * 16; }

// Rows of kDim 16-bit elements in shared memory. They are an odd number of 16-byte vectors apart,
// so that the same columns of 8 rows, which ldmatrix reads at once, lie in all 32 banks.
template <class T, int kDim>
struct Rows {
  static constexpr int kVectors = kDim / 8;
  static constexpr int kPitch = (kVectors | 1) * 8;  // elements
  T* data;

  __device__ T* at(int row, int column = 0) const { return data + row * kPitch + column; }
  __host__ __device__ static size_t bytes(int rows) { return size_t(rows) * kPitch * sizeof(T); }

  // One of `threads` threads starts to copy its part of rows [0, count), which are `stride`
  // elements apart in memory; zeros take the place of those from `existing` on. A thread keeps its
  // column, so that a step is a few additions; the last ones, which no whole row is left for, have
  // none.
  __device__ void copy(const T* from, int64_t stride, int count, int existing, int thread,
                       int threads) const {
    const int column = thread % kVectors * 8, step = threads / kVectors;
    int row = thread / kVectors;
    if (row >= step) return;
    T* to = at(row, column);
    from += row * stride + column;
    for (; row < count; row += step, to += step * kPitch, from += step * stride) {
      copy_async(to, from, row < existing);
    }
  }

  // The block starts to copy a head's tokens from the first on.
  __device__ void copy(const HeadsView& x, const HeadIndex& index, int first, int count,
                       int tokens) const {
    copy(index.in<T>(x) + first * x.token, x.token, count, tokens - first, threadIdx.x, blockDim.x);
  }

  // The words that a lane of a quad has of a row in the operand of a product: every fourth.
  __device__ uint32_t* words(int row, int lane) const {
    return reinterpret_cast<uint32_t*>(at(row)) + lane;
  }

  // The warp prepares rows [first, first + 8), which hold tokens `token` and on of q or k. A quad
  // takes a row; neighbouring quads take rows four apart, which lie 16 banks apart. Those beyond
  // the last token stay zero.
  __device__ void prepare(int first, int token, const PreparedHead<kDim>& head, int part) const {
    const int lane = threadIdx.x % 4, quad = threadIdx.x / 4 % 8, offset = quad / 2 + quad % 2 * 4;
    const bool exists = token + offset < head.tokens;
    uint32_t found[kVectors];
    QuadHead<kDim>::load_words(found, at(first + offset), lane);
    head.template apply<T>(found, part, exists ? token + offset : 0, lane);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (exists) words(first + offset, lane)[4 * j] = found[j];
    }
  }
};

// 16 rows as the left operand of products.
template <class T, int kDim>
struct Operand {
  uint32_t wide[kDim / 16][4];  // of 16 columns each
  uint32_t rest[2];             // of the last 8, if kDim is an odd multiple of 8

  __device__ void load(const Rows<T, kDim>& rows, int first) {
    const int lane = threadIdx.x % kWarp;
    // Matrices of rows 0 to 7 and 8 to 15, of 8 columns and of the next 8.
    const T* at = rows.at(first + lane % 16, lane / 16 * 8);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) load_matrices(wide[k], at + 16 * k);
    if constexpr (kDim % 16) load_matrices(rest, rows.at(first + lane % 16, kDim - 8));
  }
};

// sums += a rows^T, for kTiles operands and 8 kMatrices rows from `first` on.
template <class T, int kDim, int kTiles, int kMatrices>
__device__ void add_scores(float (&sums)[kTiles][kMatrices][4], const Operand<T, kDim> (&a)[kTiles],
                           const Rows<T, kDim>& rows, int first) {
  const int lane = threadIdx.x % kWarp;
  // Matrices of rows 0 to 7 and 8 to 15, each of columns 0 to 7 and 8 to 15.
  const T* at = rows.at(first + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
#pragma unroll
  for (int i = 0; i < kMatrices; i += 2, at += 16 * rows.kPitch) {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t b[4];
      load_matrices(b, at + 16 * k);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_matrices<T, 16>(sums[tile][i], a[tile].wide[k], {b[0], b[1]});
        multiply_matrices<T, 16>(sums[tile][i + 1], a[tile].wide[k], {b[2], b[3]});
      }
    }
    if constexpr (kDim % 16) {
      uint32_t b[2];  // of lanes 0 to 15, which have a row each
      load_matrices(b, rows.at(first + 8 * i + lane % 16, kDim - 8));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_matrices<T, 8>(sums[tile][i], a[tile].rest, {b[0]});
        multiply_matrices<T, 8>(sums[tile][i + 1], a[tile].rest, {b[1]});
      }
    }
  }
}

// Gives the scores of the columns from `count` on no weight.
template <int kTiles, int kMatrices>
__device__ void mask(float (&scores)[kTiles][kMatrices][4], int count) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kMatrices * 4; ++i) {
    if (8 * (i / 4) + column + i % 2 < count) continue;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) scores[tile][i / 4][i % 4] = -INFINITY;
  }
}

// sums += a rows. Of a (16 x 8 kMatrices) a lane has the pairs that it has of sums of that shape,
// for its upper and its lower row.
template <class T, int kDim, int kTiles, int kMatrices>
__device__ void add_weighted(float (&sums)[kTiles][kDim / 8][4],
                             const uint32_t (&a)[kTiles][kMatrices][2], const Rows<T, kDim>& rows,
                             int first) {
  constexpr int kColumns = kDim / 8;
  const int lane = threadIdx.x % kWarp;
  // Transposed matrices of rows 0 to 7 and 8 to 15, of 8 columns and of the next 8.
  const T* at = rows.at(first + lane % 16, lane / 16 * 8);
#pragma unroll
  for (int i = 0; i < kMatrices; i += 2, at += 16 * rows.kPitch) {
    auto add = [&](int j, const uint32_t (&b)[2]) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const auto& left = a[tile];
        multiply_matrices<T, 16>(sums[tile][j],
                                 {left[i][0], left[i][1], left[i + 1][0], left[i + 1][1]}, b);
      }
    };
#pragma unroll
    for (int j = 0; j + 1 < kColumns; j += 2) {
      uint32_t b[4];
      load_matrices<true>(b, at + 8 * j);
      add(j, {b[0], b[1]});
      add(j + 1, {b[2], b[3]});
    }
    if constexpr (kColumns % 2) {
      uint32_t b[2];
      load_matrices<true>(b, at + 8 * (kColumns - 1));
      add(kColumns - 1, b);
    }
  }
}

}  // namespace msf
