// attention. The equations are in msf_kernels/attention/reference.py.
#include "attention.cuh"
#include "dispatch.cuh"

namespace msf {
namespace {

constexpr int kMaxWarps = 4;   // of a block
constexpr int kChunk = 2;      // 16-key groups that are scored before their softmax
constexpr int kStreamed = 64;  // keys that arrive at once

// The probabilities of a row lie between 0 and 2^kHeadroom: they are rescaled where a score would
// exceed that, and not for each new maximum.
constexpr float kHeadroom = 8;

// Tiles of 16 queries that a warp works on at once: with two, each operand that is loaded from
// shared memory serves two products.
template <int kDim>
constexpr int kTiles = kDim <= 96 ? 2 : 1;
template <int kDim>
constexpr int kQueries = 16 * kTiles<kDim>;  // of a warp

struct Arguments {
  HeadGrid grid;
  HeadsView q, k, v;  // (B, N, H, d)
  Preparation preparation;
  float scale;        // log2(e) / sqrt(d)
  Address out;        // (B, N, H, d)
  Address logsumexp;  // (B, H, N) in float32
};

// The queries of a warp, and what has been summed for them over the keys so far. In each tile a
// lane has rows l / 4 and l / 4 + 8.
template <class T, int kDim>
struct Queries {
  static constexpr int kColumns = kDim / 8, kCount = kTiles<kDim>;
  Operand<T, kDim> q[kCount];
  float out[kCount][kColumns][4] = {};
  float total[kCount][2] = {};  // of the lane's own columns
  float largest[kCount][2];     // in units of log2: what has been subtracted from the scores
  float scale;                  // log2(e) / sqrt(d)

  // Takes queries from rows of the warp.
  __device__ Queries(const Rows<T, kDim>& rows, float scale) : scale(scale) {
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile) {
      q[tile].load(rows, 16 * tile);
      largest[tile][0] = largest[tile][1] = -INFINITY;
    }
  }

  // Attends to keys [0, count) in shared memory, whose rows are there up to a multiple of 16.
  __device__ void attend(const Rows<T, kDim>& keys, const Rows<T, kDim>& values, int count) {
    int first = 0;
    for (; first + 16 * (kChunk - 1) < count; first += 16 * kChunk) {
      attend_chunk<kChunk>(keys, values, first, count - first);
    }
    if (first < count) attend_chunk<1>(keys, values, first, count - first);
  }

  // Leaves the outputs, rounded, in rows of the warp, and writes the logsumexp of those that exist.
  // The bias of v is added here: the weights of a query's values add up to 1.
  __device__ void finish(const Rows<T, kDim>& rows, const float* bias, float* logsumexp,
                         int existing) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
      const int tile = i / 2, lower = i % 2, row = threadIdx.x % kWarp / 4 + 8 * i;
      const float sum = quad_sum(total[tile][lower]), factor = 1 / sum;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const auto& sums = out[tile][j];
        float low = sums[2 * lower] * factor, high = sums[2 * lower + 1] * factor;
        if (bias) {
          low += bias[8 * j + 2 * lane];
          high += bias[8 * j + 2 * lane + 1];
        }
        rows.words(row, lane)[4 * j] = pack<T>(low, high);
      }
      if (lane == 0 && row < existing) logsumexp[row] = (largest[tile][lower] + log2f(sum)) * kLn2;
    }
  }

 private:
  template <int kGroups>
  __device__ void attend_chunk(const Rows<T, kDim>& keys, const Rows<T, kDim>& values, int first,
                               int count) {
    float scores[kCount][2 * kGroups][4] = {};
    add_scores(scores, q, keys, first);
    if (count < 16 * kGroups) mask(scores, count);
    uint32_t probabilities[kCount][2 * kGroups][2];
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile) {
      rescale(scores[tile], tile);
      softmax(probabilities[tile], scores[tile], tile);
    }
    add_weighted(out, probabilities, values, first);
  }

  // Subtracts more from the scores of the tile where some of the warp's would pass the headroom.
  template <int kScores>
  __device__ void rescale(const float (&scores)[kScores][4], int tile) {
    float high[2] = {scores[0][0], scores[0][2]};
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      high[0] = fmaxf(high[0], fmaxf(scores[i][0], scores[i][1]));
      high[1] = fmaxf(high[1], fmaxf(scores[i][2], scores[i][3]));
    }
    const bool passes = high[0] * scale > largest[tile][0] + kHeadroom ||
                        high[1] * scale > largest[tile][1] + kHeadroom;
    if (!__any_sync(kAllLanes, passes)) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float before = largest[tile][row];
      largest[tile][row] = fmaxf(before, quad_max(high[row]) * scale);
      const float factor = exp2_fast(before - largest[tile][row]);
      total[tile][row] *= factor;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        out[tile][j][2 * row] *= factor;
        out[tile][j][2 * row + 1] *= factor;
      }
    }
  }

  template <int kScores>
  __device__ void softmax(uint32_t (&probabilities)[kScores][2], const float (&scores)[kScores][4],
                          int tile) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float low = exp2_fast(fmaf(scores[i][2 * row], scale, -largest[tile][row]));
        const float high = exp2_fast(fmaf(scores[i][2 * row + 1], scale, -largest[tile][row]));
        total[tile][row] += low + high;
        probabilities[i][row] = pack<T>(low, high);
      }
    }
  }
};

// Starts to copy the queries from `first` on to the rows of a warp.
template <class T, int kDim>
__device__ void copy_queries(const Rows<T, kDim>& rows, const Arguments& a, const HeadIndex& index,
                             int first) {
  rows.copy(index.in<T>(a.q) + first * a.q.token, a.q.token, kQueries<kDim>, a.grid.tokens - first,
            threadIdx.x % kWarp, kWarp);
}

// Writes the outputs of the queries from `first` on, through the rows of the warp.
template <class T, int kDim>
__device__ void write(Queries<T, kDim>& queries, const Rows<T, kDim>& rows, const Arguments& a,
                      const HeadIndex& index, const float* bias, int first) {
  const int tokens = a.grid.tokens;
  const int64_t stride = int64_t(a.grid.heads) * kDim;
  float* const logsumexp = a.logsumexp.as<float>() + index.index * tokens + first;
  queries.finish(rows, bias, logsumexp, tokens - first);
  __syncwarp();
  T* const out = a.out.as<T>() + (index.sample * tokens + first) * stride + index.head * kDim;
  for (int i = threadIdx.x % kWarp; i < kQueries<kDim> * rows.kVectors; i += kWarp) {
    const int row = i / rows.kVectors, column = i % rows.kVectors * 8;
    if (first + row >= tokens) break;
    Vector<T, 8>::load(rows.at(row, column)).store(out + row * stride + column);
  }
  __syncwarp();
}

// Each block has one head, whose keys and values lie in its shared memory. Each of its warps takes
// kQueries queries at a time.
// registers: 255
template <class T, int kDim>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2) attention_of_head_kernel(Arguments a) {
  MSF_DYNAMIC_SHARED(T, shared);
  const int tokens = a.grid.tokens, count = padded(tokens);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Rows<T, kDim> keys{shared}, values{keys.at(count)};
  const Rows<T, kDim> rows{values.at(count + warp * kQueries<kDim>)};  // of the warp
  auto* const parameters = reinterpret_cast<float*>(values.at(count + warps * kQueries<kDim>));
  const PreparedHead<kDim> head{a.preparation, parameters, tokens};
  const HeadIndex index(blockIdx.x, a.grid.heads);
  int first = warp * kQueries<kDim>;
  keys.copy(a.k, index, 0, count, tokens);
  commit_copies();
  values.copy(a.v, index, 0, count, tokens);
  copy_queries(rows, a, index, first);
  commit_copies();
  if (a.preparation) {
    head.template load<T>(index.head, a.grid.heads);
    wait_copies<1>();
    __syncthreads();
    for (int row = 8 * warp; row < tokens; row += 8 * warps) {
      keys.prepare(row, row, head, 1);
    }
  }
  wait_copies<0>();
  __syncthreads();
  while (first < tokens) {
    if (a.preparation) {
      for (int row = 0; row < kQueries<kDim>; row += 8) {
        rows.prepare(row, first + row, head, 0);
      }
      __syncwarp();
    }
    Queries<T, kDim> queries(rows, a.scale);
    __syncwarp();
    queries.attend(keys, values, tokens);
    write(queries, rows, a, index, head.bias(2), first);
    first += warps * kQueries<kDim>;
    if (first < tokens) copy_queries(rows, a, index, first);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
  }
}

// Each block has kMaxWarps kQueries queries of a head, whose keys and values stream through its
// shared memory: while it works on kStreamed of them, the next are on their way.
// registers: 255
template <class T, int kDim>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2) attention_kernel(Arguments a) {
  MSF_DYNAMIC_SHARED(T, shared);
  const int tokens = a.grid.tokens, warp = threadIdx.x / kWarp;
  constexpr int kBlock = kMaxWarps * kQueries<kDim>;
  const unsigned blocks = (tokens + kBlock - 1) / kBlock;
  const HeadIndex index(blockIdx.x / blocks, a.grid.heads);
  const int first = blockIdx.x % blocks * kBlock + warp * kQueries<kDim>;
  const Rows<T, kDim> stream{shared}, rows{stream.at(4 * kStreamed + warp * kQueries<kDim>)};
  auto keys = [&](int from) {
    return Rows<T, kDim>{stream.at(from / kStreamed % 2 * 2 * kStreamed)};
  };
  auto values = [&](int from) { return Rows<T, kDim>{keys(from).at(kStreamed)}; };
  auto copy = [&](int from) {
    if (from >= tokens) return;
    keys(from).copy(a.k, index, from, kStreamed, tokens);
    values(from).copy(a.v, index, from, kStreamed, tokens);
    commit_copies();
  };
  copy_queries(rows, a, index, first);
  copy(0);
  wait_copies<0>();
  __syncwarp();
  Queries<T, kDim> queries(rows, a.scale);
  for (int from = 0; from < tokens; from += kStreamed) {
    __syncthreads();  // all see the keys from `from` on, and have done with those before
    copy(from + kStreamed);
    const int rest = tokens - from;
    queries.attend(keys(from), values(from), rest < kStreamed ? rest : kStreamed);
    wait_copies<0>();
  }
  write(queries, rows, a, index, nullptr, first);
}

// The shared memory of a block that holds whole heads.
template <class T, int kDim>
size_t bytes_of_head(int tokens, int warps) {
  return Rows<T, kDim>::bytes(2 * padded(tokens) + warps * kQueries<kDim>) +
         PreparedHead<kDim>::kParameters * kDim * sizeof(float);
}

template <int kDim>
int warps_of_head(int tokens) {
  return even_warps((tokens + kQueries<kDim> - 1) / kQueries<kDim>, kMaxWarps);
}

}  // namespace

bool attention_fits(HeadGrid grid, int shared_limit) {
  bool fits = false;
  with_head_dim(grid.head_dim, [&](auto dim) {
    using T = __half;
    const int warps = warps_of_head<dim.value>(grid.tokens);
    fits = bytes_of_head<T, dim.value>(grid.tokens, warps) <= size_t(shared_limit);
  });
  return fits;
}

void attention(DType dtype, HeadGrid grid, HeadsView q, HeadsView k, HeadsView v,
               Preparation preparation, Address out, Address logsumexp, int shared_limit,
               Address stream) {
  const int64_t heads = int64_t(grid.batch) * grid.heads;
  if (heads == 0) return;
  const float scale = kLog2E / std::sqrt(float(grid.head_dim));
  const Arguments arguments{grid, q, k, v, preparation, scale, out, logsumexp};
  with_16_bits(dtype, [&](auto type) {
    with_built_head_dim(grid.head_dim, [&](auto dim) {
      using T = typename decltype(type)::type;
      constexpr int kDim = dim.value;
      if (attention_fits(grid, shared_limit)) {
        const int warps = warps_of_head<kDim>(grid.tokens);
        launch<attention_of_head_kernel<T, kDim>>(dim3(heads), dim3(warps * kWarp),
                                                  bytes_of_head<T, kDim>(grid.tokens, warps),
                                                  cuda_stream(stream), arguments);
        return;
      }
      if (preparation) throw std::runtime_error("msf: prepare what does not fit first");
      constexpr int kBlock = kMaxWarps * kQueries<kDim>;
      const int64_t blocks = heads * ((grid.tokens + kBlock - 1) / kBlock);
      launch<attention_kernel<T, kDim>>(dim3(blocks), dim3(kMaxWarps * kWarp),
                                        Rows<T, kDim>::bytes(4 * kStreamed + kBlock),
                                        cuda_stream(stream), arguments);
    });
  });
}

}  // namespace msf
