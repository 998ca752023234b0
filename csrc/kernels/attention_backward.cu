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

struct BackwardArguments {
  HeadGrid grid;
  HeadsView q, k, v, out, grad;  // (B, N, H, d)
  Preparation preparation;
  const float* logsumexp;   // (B, H, N)
  float scale, log2_scale;  // 1 / sqrt(d), and that times log2(e)
  Address grad_qkv;         // (B, N, 3, H, d)
  float* partials;          // (5, H, B, d), of the parameters in the order of PreparedHead
};

// The shared memory of a block.
template <class T, int kDim>
struct Head {
  static constexpr int kParameters = PreparedHead<kDim>::kParameters * kDim;
  Rows<T, kDim> q, k, v, grad;
  float* lse;    // log2(e) logsumexp; infinite beyond the last token, so that p is 0 there
  float* delta;  // the row sums of grad * (out - the bias of v), over sqrt(d)
  PreparedHead<kDim> prepared;
  float* sums;  // (warps, 5, d), of the gradients of the parameters

  __device__ Head(T* shared, int count, const BackwardArguments& a)
      : q{shared},
        k{q.at(count)},
        v{k.at(count)},
        grad{v.at(count)},
        lse(reinterpret_cast<float*>(grad.at(count))),
        delta(lse + count),
        prepared{a.preparation, delta + count, a.grid.tokens},
        sums(prepared.shared + kParameters) {}

  static size_t bytes(int tokens, int warps) {
    const int floats = 2 * padded(tokens) + kParameters * (1 + warps);
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
      const float* bias = head.prepared.bias(2);
      for (int i = lane; i < head.q.kVectors; i += 4) {
        const auto x = Vector<T, 8>::load(out + 8 * i);
        const auto g = Vector<T, 8>::load(head.grad.at(row, 8 * i));
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float value = to_compute(x[k]) - (bias ? bias[8 * i + k] : 0);
          sum = fmaf(value, to_compute(g[k]), sum);
        }
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
  // The registers do not hold both operands of 128 channels: they are loaded for each chunk.
  static constexpr bool kHeld = kDim <= 96;
  Operand<T, kDim> scored[1], weighted[1];  // k and v, or q and grad
  float grad[1][kDim / 8][4] = {};          // of k or q
  float grad_v[1][kDim / 8][4] = {};
  int own;  // the first row

  __device__ Tile(const Head<T, kDim>& head, int first) : own(first) {
    if (kHeld) load(head);
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
  __device__ void load(const Head<T, kDim>& head) {
    scored[0].load(kKeys ? head.k : head.q, own);
    weighted[0].load(kKeys ? head.v : head.grad, own);
  }

  // With the scores s and their probabilities p = exp(s - logsumexp), the gradients of the scores
  // times 1 / sqrt(d) are ds = p (grad v^T / sqrt(d) - delta); for keys all of these are
  // transposed. Keys beyond the last are masked: their p would be exp(-logsumexp), of any size.
  template <int kGroups>
  __device__ void visit_chunk(const Head<T, kDim>& head, const BackwardArguments& a, int first,
                              int count) {
    constexpr int kMatrices = 2 * kGroups;
    float scores[1][kMatrices][4] = {}, products[1][kMatrices][4] = {};
    if (!kHeld) load(head);
    add_scores(scores, scored, kKeys ? head.q : head.k, first);
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

// Writes the gradient of a row of q or k, and adds what it gives to those of weight and bias to the
// warp's `sums`, together with the other quads of the warp.
template <class T, int kDim>
__device__ void write_prepared(const float (&row)[kDim / 8][4], int lower,
                               const PreparedHead<kDim>& head, int part, const T* x, T* grad_x,
                               int token, float* sums) {
  const int lane = threadIdx.x % 4;
  const bool exists = token < head.tokens;
  uint32_t words[kDim / 8] = {};
  QuadHead<kDim> grad, raw;
  grad.take(row, lower);
  if (exists) QuadHead<kDim>::load_words(words, x, lane);
  raw.template unpack<T>(words);
  head.undo(grad, raw, part, exists ? token : 0, lane);
  grad.template pack_into<T>(words);
  if (exists) QuadHead<kDim>::store_words(words, grad_x, lane);
  if (head.weight(part)) raw.add_to(sums + part * kDim, lane, exists);
  if (head.bias(part)) grad.add_to(sums + (2 + part) * kDim, lane, exists);
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

// Adds up the columns of the first `count` of 16 rows, into `sums` (d,).
template <int kColumns>
__device__ void add_columns(const float (&rows)[kColumns][4], int count, float* sums) {
  const int row = threadIdx.x % kWarp / 4, lane = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2 * kColumns; ++i) {
    const float upper = rows[i / 2][i % 2], lower = rows[i / 2][2 + i % 2];
    const float sum = sum_over_quads((row < count ? upper : 0) + (row + 8 < count ? lower : 0));
    if (row == 0) sums[i / 2 * 8 + 2 * lane + i % 2] += sum;
  }
}

template <class T, int kDim, bool kKeys>
__device__ void work_on(const Head<T, kDim>& head, const BackwardArguments& a,
                        const HeadIndex& index, int first) {
  Tile<T, kDim, kKeys> tile(head, first);
  tile.visit(head, a);
  const int tokens = a.grid.tokens, heads = a.grid.heads;
  const HeadsView& x = kKeys ? a.k : a.q;
  const PreparedHead<kDim>& prepared = head.prepared;
  float* const sums = head.sums + threadIdx.x / kWarp * head.kParameters;
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
  if (kKeys && prepared.bias(2)) add_columns(tile.grad_v[0], tokens - first, sums + 4 * kDim);
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int token = token_of(lower);
    T* const grad_x = grad_of(token, kKeys);
    if (a.preparation) {
      write_prepared(tile.grad[0], lower, prepared, kKeys, index.in<T>(x) + token * x.token, grad_x,
                     token, sums);
    } else if (token < tokens) {
      write_plain<T, kDim>(tile.grad[0], lower, grad_x);
    }
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
  const Head<T, kDim> head(shared, count, a);
  head.q.copy(a.q, index, 0, count, tokens);
  head.k.copy(a.k, index, 0, count, tokens);
  commit_copies();
  head.grad.copy(a.grad, index, 0, count, tokens);
  head.v.copy(a.v, index, 0, count, tokens);
  commit_copies();
  if (a.preparation) {
    head.prepared.template load<T>(index.head, a.grid.heads);
    for (int i = threadIdx.x; i < warps * head.kParameters; i += blockDim.x) head.sums[i] = 0;
    wait_copies<1>();
    __syncthreads();
    for (int row = 8 * warp; row < tokens; row += 8 * warps) {
      head.q.prepare(row, row, head.prepared, 0);
      head.k.prepare(row, row, head.prepared, 1);
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
  for (int i = threadIdx.x; i < head.kParameters; i += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += head.sums[w * head.kParameters + i];
    const int64_t row = int64_t(i / kDim) * a.grid.heads + index.head;
    a.partials[(row * a.grid.batch + index.sample) * kDim + i % kDim] = sum;
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
                        HeadsView out, HeadsView grad, Preparation preparation, Address logsumexp,
                        Address grad_qkv, Address partials, PreparationGradient sums,
                        Address stream) {
  const int64_t heads = int64_t(grid.batch) * grid.heads;
  const float scale = 1 / std::sqrt(float(grid.head_dim));
  const BackwardArguments arguments{grid,        q,
                                    k,           v,
                                    out,         grad,
                                    preparation, logsumexp.as<const float>(),
                                    scale,       scale * kLog2E,
                                    grad_qkv,    partials.as<float>()};
  with_16_bits(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_built_head_dim(grid.head_dim, [&](auto dim) {
      if (heads == 0) return;
      const int warps = warps_of(grid.tokens);
      launch<attention_backward_kernel<T, dim.value>>(dim3(heads), dim3(warps * kWarp),
                                                      Head<T, dim.value>::bytes(grid.tokens, warps),
                                                      cuda_stream(stream), arguments);
    });
    if (!sums.bias.data && !sums.q_weight.data && !sums.k_weight.data) return;
    // A weight's gradient is one sum over heads and samples, a bias' one over samples for each
    // head.
    auto total = [&](int first, const Parameter& sum, int rows) -> PartialSums<float> {
      if (!sum.data) return {};
      const float* from = partials.as<const float>() + first * heads * grid.head_dim;
      return {from, sum.data, sum.dtype, rows, rows > 1 ? grid.batch : heads};
    };
    const int rows = 3 * grid.heads;
    sum_partials<float>(
        grid.head_dim,
        {total(0, sums.q_weight, 1), total(1, sums.k_weight, 1), total(2, sums.bias, rows), {}},
        stream);
  });
}

}  // namespace msf
