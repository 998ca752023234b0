// The gradient of attention. The equations are in msf_kernels/attention/reference.py.
//
// A block has a head, whose q, k, v and gradient lie in its shared memory. Tiles of 16 keys go over
// all queries, for the gradients of k and v, and tiles of 16 queries over all keys, for that of q.
// So scores and probabilities are computed twice, which makes seven products of five; but nothing
// is summed over warps, so no order of summation depends on which is faster.
#include "attention.cuh"
#include "dispatch.cuh"
#include "partials.cuh"

namespace msf {
namespace {

constexpr int kBackwardWarps = 8;  // of a block

// Groups of 16 rows that a tile is multiplied with at once: with two, 128 channels would spill.
template <int kDim>
constexpr int kBackwardChunk = kDim <= 96 ? 2 : 1;
constexpr int kGroups = 32;  // threads that share a channel in the sum over heads

struct BackwardArguments {
  HeadGrid grid;
  HeadsView q, k, v, out, grad;  // (B, N, H, d)
  Preparation preparation;
  const float* logsumexp;   // (B, H, N)
  float scale, log2_scale;  // 1 / sqrt(d), and that times log2(e)
  Address grad_qkv;         // (B, N, 3, H, d)
  float* partials;          // (2, B, H, d), of the norm weights of q and k; or absent
};

// The shared memory of a block.
template <class T, int kDim>
struct Head {
  Rows<T, kDim> q, k, v, grad;
  float* lse;      // log2(e) logsumexp; infinite beyond the last token, so that p is 0 there
  float* delta;    // the row sums of grad * out, over sqrt(d)
  float* weights;  // (2, d), of q and k
  float* sums;     // (warps, 2, d), of the gradients of the weights

  __device__ Head(T* shared, int count)
      : q{shared},
        k{q.at(count)},
        v{k.at(count)},
        grad{v.at(count)},
        lse(reinterpret_cast<float*>(grad.at(count))),
        delta(lse + count),
        weights(delta + count),
        sums(weights + 2 * kDim) {}

  static size_t bytes(int tokens, int warps) {
    const int floats = 2 * padded(tokens) + 2 * kDim * (1 + warps);
    return Rows<T, kDim>::bytes(4 * padded(tokens)) + floats * sizeof(float);
  }
};

// Reads the logsumexp and adds up grad * out: a quad for each row.
template <class T, int kDim>
__device__ void read_rows(const Head<T, kDim>& head, const BackwardArguments& a,
                          const HeadIndex& index) {
  const int tokens = a.grid.tokens, lane = threadIdx.x % 4;
  for (int row = threadIdx.x / 4; row < padded(tokens); row += blockDim.x / 4) {
    float sum = 0;
    if (row < tokens) {
      const T* out = index.in<T>(a.out) + row * a.out.token;
      for (int i = lane; i < head.q.kVectors; i += 4) {
        const auto x = Vector<T, 8>::load(out + 8 * i);
        const auto g = Vector<T, 8>::load(head.grad.at(row, 8 * i));
#pragma unroll
        for (int k = 0; k < 8; ++k) sum = fmaf(to_compute(x[k]), to_compute(g[k]), sum);
      }
    }
    sum = quad_sum(sum);
    if (lane) continue;
    head.delta[row] = sum * a.scale;
    head.lse[row] = row < tokens ? a.logsumexp[index.index * tokens + row] * kLog2E : INFINITY;
  }
}

// A tile of 16 rows, keys if kKeys and queries if not, and the gradients that they get from all
// rows of the other kind. A lane has rows l / 4 and l / 4 + 8.
template <class T, int kDim, bool kKeys>
struct Tile {
  // The registers do not hold both operands of 128 channels: one is loaded for each chunk.
  static constexpr bool kHeld = kDim <= 96;
  Operand<T, kDim> scored[1], weighted[1];  // k and v, or q and grad
  float grad[1][kDim / 8][4] = {};          // of k or q
  float grad_v[1][kDim / 8][4] = {};
  int own;  // the first row

  __device__ Tile(const Head<T, kDim>& head, int first) : own(first) {
    scored[0].load(kKeys ? head.k : head.q, first);
    if (kHeld) weighted[0].load(kKeys ? head.v : head.grad, first);
  }

  // Visits all rows of the other kind.
  __device__ void visit(const Head<T, kDim>& head, const BackwardArguments& a) {
    constexpr int kChunk = kBackwardChunk<kDim>;
    const int tokens = a.grid.tokens;
    int first = 0;
    for (; first + 16 * (kChunk - 1) < tokens; first += 16 * kChunk) {
      visit_chunk<kChunk>(head, a, first, tokens - first);
    }
    if (first < tokens) visit_chunk<1>(head, a, first, tokens - first);
  }

 private:
  // With the scores s and their probabilities p = exp(s - logsumexp), the gradients of the scores
  // times 1 / sqrt(d) are ds = p (grad v^T / sqrt(d) - delta); for keys all of these are
  // transposed. Keys beyond the last are masked: their p would be exp(-logsumexp), of any size.
  template <int kGroups>
  __device__ void visit_chunk(const Head<T, kDim>& head, const BackwardArguments& a, int first,
                              int count) {
    constexpr int kMatrices = 2 * kGroups;
    float scores[1][kMatrices][4] = {}, products[1][kMatrices][4] = {};
    add_scores(scores, scored, kKeys ? head.q : head.k, first);
    if (!kHeld) weighted[0].load(kKeys ? head.v : head.grad, own);
    add_scores(products, weighted, kKeys ? head.grad : head.v, first);
    if (!kKeys && count < 16 * kGroups) mask(scores, count);
    uint32_t p[1][kMatrices][2], ds[1][kMatrices][2];
#pragma unroll
    for (int i = 0; i < kMatrices; ++i) {
      const int column = first + 8 * i + threadIdx.x % 4 * 2, row = own + threadIdx.x % kWarp / 4;
      float weight[4], grad_score[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int query = kKeys ? column + k % 2 : row + 8 * (k / 2);
        weight[k] = exp2_fast(fmaf(scores[0][i][k], a.log2_scale, -head.lse[query]));
        grad_score[k] = weight[k] * fmaf(products[0][i][k], a.scale, -head.delta[query]);
      }
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        p[0][i][lower] = pack<T>(weight[2 * lower], weight[2 * lower + 1]);
        ds[0][i][lower] = pack<T>(grad_score[2 * lower], grad_score[2 * lower + 1]);
      }
    }
    if constexpr (kKeys) add_weighted(grad_v, p, head.grad, first);
    add_weighted(grad, ds, kKeys ? head.q : head.k, first);
  }
};

// Writes the gradient of a row of q or k, and adds what it gives to that of the norm weight.
template <class T, int kDim>
__device__ void write_prepared(const float (&sums)[kDim / 8][4], int lower,
                               const Preparation& preparation, const float* weight, const T* x,
                               T* grad_x, int token, QuadHead<kDim>& grad_weight) {
  const int lane = threadIdx.x % 4;
  const bool exists = token < preparation.tokens;
  uint32_t words[kDim / 8] = {};
  QuadHead<kDim> grad, raw;
  grad.take(sums, lower);
  if (exists) QuadHead<kDim>::load_words(words, x, lane);
  raw.template unpack<T>(words);
  preparation.undo(grad, raw, weight, exists ? token : 0, lane);
  grad.template pack_into<T>(words);
  if (!exists) return;
  QuadHead<kDim>::store_words(words, grad_x, lane);
#pragma unroll
  for (int i = 0; i < kDim / 4; ++i) grad_weight.channels[i] += raw.channels[i];
}

// Writes the gradient of a row of v, or of q or k that were not prepared.
template <class T, int kDim>
__device__ void write_plain(const float (&sums)[kDim / 8][4], int lower, T* grad_x) {
  auto* words = reinterpret_cast<uint32_t*>(grad_x) + threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j) {
    words[4 * j] = pack<T>(sums[j][2 * lower], sums[j][2 * lower + 1]);
  }
}

template <class T, int kDim, bool kKeys>
__device__ void work_on(const Head<T, kDim>& head, const BackwardArguments& a,
                        const HeadIndex& index, int first) {
  Tile<T, kDim, kKeys> tile(head, first);
  tile.visit(head, a);
  const int tokens = a.grid.tokens, heads = a.grid.heads;
  const HeadsView& x = kKeys ? a.k : a.q;
  const NormWeight& norm = kKeys ? a.preparation.k_weight : a.preparation.q_weight;
  const float* weight = norm.data ? head.weights + kKeys * kDim : nullptr;
  auto token_of = [&](int lower) { return first + int(threadIdx.x) % kWarp / 4 + 8 * lower; };
  auto grad_of = [&](int token, int part) {
    const int64_t row = ((index.sample * tokens + token) * 3 + part) * heads + index.head;
    return a.grad_qkv.as<T>() + row * kDim;
  };
#pragma unroll
  for (int lower = 0; kKeys && lower < 2; ++lower) {
    const int token = token_of(lower);
    if (token < tokens) write_plain<T, kDim>(tile.grad_v[0], lower, grad_of(token, 2));
  }
  QuadHead<kDim> grad_weight = {};
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int token = token_of(lower);
    T* const grad_x = grad_of(token, kKeys);
    if (a.preparation) {
      write_prepared(tile.grad[0], lower, a.preparation, weight, index.in<T>(x) + token * x.token,
                     grad_x, token, grad_weight);
    } else if (token < tokens) {
      write_plain<T, kDim>(tile.grad[0], lower, grad_x);
    }
  }
  if (weight) {
    float* sums = head.sums + (threadIdx.x / kWarp * 2 + kKeys) * kDim;
    grad_weight.add_to(sums, threadIdx.x % 4);
  }
}

// registers: 255
template <class T, int kDim>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 1)
    attention_backward_kernel(BackwardArguments a) {
  MSF_DYNAMIC_SHARED(T, shared);
  const int tokens = a.grid.tokens, count = padded(tokens), tiles = count / 16;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const HeadIndex index(blockIdx.x, a.grid.heads);
  const Head<T, kDim> head(shared, count);
  head.q.copy(a.q, index, 0, count, tokens);
  head.k.copy(a.k, index, 0, count, tokens);
  commit_copies();
  head.grad.copy(a.grad, index, 0, count, tokens);
  head.v.copy(a.v, index, 0, count, tokens);
  commit_copies();
  if (a.preparation) {
    a.preparation.load_weights<T>(head.weights, kDim);
    for (int i = threadIdx.x; i < warps * 2 * kDim; i += blockDim.x) head.sums[i] = 0;
    wait_copies<1>();
    __syncthreads();
    for (int row = 8 * warp; row < tokens; row += 8 * warps) {
      head.q.prepare(row, row, a.preparation, a.preparation.q_weight.data ? head.weights : nullptr);
      head.k.prepare(row, row, a.preparation,
                     a.preparation.k_weight.data ? head.weights + kDim : nullptr);
    }
  }
  wait_copies<0>();
  __syncthreads();
  read_rows(head, a, index);
  __syncthreads();
  for (int i = warp; i < 2 * tiles; i += warps) {
    if (i < tiles) {
      work_on<T, kDim, true>(head, a, index, 16 * i);
    } else {
      work_on<T, kDim, false>(head, a, index, 16 * (i - tiles));
    }
  }
  if (!a.partials) return;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * kDim; i += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += head.sums[w * 2 * kDim + i];
    a.partials[(int64_t(i / kDim) * gridDim.x + blockIdx.x) * kDim + i % kDim] = sum;
  }
}

int warps_of(int tokens) { return even_warps(2 * (padded(tokens) / 16), kBackwardWarps); }

}  // namespace

bool attention_backward_fits(HeadGrid grid, int shared_limit) {
  bool fits = false;
  with_head_dim(grid.head_dim, [&](auto dim) {
    fits =
        Head<__half, dim.value>::bytes(grid.tokens, warps_of(grid.tokens)) <= size_t(shared_limit);
  });
  return fits;
}

void attention_backward(DType dtype, HeadGrid grid, HeadsView q, HeadsView k, HeadsView v,
                        HeadsView out, HeadsView grad, NormWeight q_weight, NormWeight k_weight,
                        Address rope, double eps, Address logsumexp, Address grad_qkv,
                        Address partials, NormWeight grad_q_weight, NormWeight grad_k_weight,
                        Address stream) {
  const int64_t heads = int64_t(grid.batch) * grid.heads;
  const Preparation preparation{q_weight, k_weight, rope.as<const float>(), grid.tokens,
                                float(eps)};
  const float scale = 1 / std::sqrt(float(grid.head_dim));
  const BackwardArguments arguments{grid,        q,
                                    k,           v,
                                    out,         grad,
                                    preparation, logsumexp.as<const float>(),
                                    scale,       scale * kLog2E,
                                    grad_qkv,    partials.as<float>()};
  with_16_bits(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_head_dim(grid.head_dim, [&](auto dim) {
      if (heads == 0) return;
      const int warps = warps_of(grid.tokens);
      launch<attention_backward_kernel<T, dim.value>>(dim3(heads), dim3(warps * kWarp),
                                                      Head<T, dim.value>::bytes(grid.tokens, warps),
                                                      cuda_stream(stream), arguments);
    });
    if (!q_weight.data && !k_weight.data) return;
    auto sums = [&](int i, const NormWeight& sum) -> PartialSums<float> {
      if (!sum.data) return {};
      return {partials.as<const float>() + i * heads * grid.head_dim, sum.data, sum.dtype, 1,
              heads};
    };
    sum_partials<T, kGroups>(grid.head_dim, 1, {sums(0, grad_q_weight), sums(1, grad_k_weight), {}},
                             stream);
  });
}

}  // namespace msf
