// attention. The equations are in msf_kernels/attention/reference.py.
#include "dispatch.cuh"
#include "queries.cuh"

namespace msf {
namespace {

constexpr int kMaxWarps = 4;   // of a block
constexpr int kStreamed = 64;  // keys that arrive at once

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
  Address logsumexp;  // (B, H, N) in float32, absent where no gradient is to come
};

// Starts to copy the queries from `first` on to the rows of a warp.
template <class T, int kDim>
__device__ void copy_queries(const Rows<T, kDim>& rows, const Arguments& a, const HeadIndex& index,
                             int first) {
  rows.copy(index.in<T>(a.q) + first * a.q.token, a.q.token, kQueries<kDim>, a.grid.tokens - first,
            threadIdx.x % kWarp, kWarp);
}

// Writes the outputs of the queries from `first` on, through the rows of the warp.
template <class T, int kDim, int kCount>
__device__ void write(Queries<T, kDim, kCount>& queries, const Rows<T, kDim>& rows,
                      const Arguments& a, const HeadIndex& index, const float* bias, int first) {
  const int tokens = a.grid.tokens;
  const int64_t stride = int64_t(a.grid.heads) * kDim;
  float* const logsumexp = a.logsumexp.as<float>();
  queries.finish(rows, bias, logsumexp ? logsumexp + index.index * tokens + first : nullptr,
                 tokens - first);
  __syncwarp();
  T* const out = a.out.as<T>() + (index.sample * tokens + first) * stride + index.head * kDim;
  for (int i = threadIdx.x % kWarp; i < 16 * kCount * rows.kVectors; i += kWarp) {
    const int row = i / rows.kVectors, column = i % rows.kVectors * 8;
    if (first + row >= tokens) break;
    Vector<T, 8>::load(rows.at(row, column)).store(out + row * stride + column);
  }
  __syncwarp();
}

// A head in the shared memory of a block, and the rows of one of its warps.
template <class T, int kDim>
struct WholeHead {
  Rows<T, kDim> keys, values, rows;
  PreparedHead<kDim> prepared;

  // The warp attends 16 kCount queries from `first` on, which lie in its rows, to all keys.
  template <int kCount>
  __device__ void attend(const Arguments& a, const HeadIndex& index, int first) const {
    Queries<T, kDim, kCount> queries(rows, a.scale);
    __syncwarp();
    queries.attend(keys, values, a.grid.tokens);
    write(queries, rows, a, index, prepared.bias(2), first);
  }
};

// Each block has one head, whose keys and values lie in its shared memory. Each of its warps takes
// kQueries queries at a time.
// registers: 255
template <class T, int kDim>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2) attention_of_head_kernel(Arguments a) {
  MSF_DYNAMIC_SHARED(T, shared);
  const int tokens = a.grid.tokens, count = padded(tokens);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Rows<T, kDim> keys{shared}, values{keys.at(count)}, all_rows{values.at(count)};
  const Rows<T, kDim> rows{all_rows.at(warp * kQueries<kDim>)};
  auto* const parameters = reinterpret_cast<float*>(all_rows.at(warps * kQueries<kDim>));
  const WholeHead<T, kDim> head{keys, values, rows, {a.preparation, parameters, tokens}};
  const HeadIndex index(blockIdx.x, a.grid.heads);
  int first = warp * kQueries<kDim>;
  keys.copy(a.k, index, 0, count, tokens);
  commit_copies();
  values.copy(a.v, index, 0, count, tokens);
  copy_queries(rows, a, index, first);
  commit_copies();
  if (a.preparation) {
    head.prepared.template load<T>(index.head, a.grid.heads);
    wait_copies<1>();
    __syncthreads();
    for (int row = 8 * warp; row < tokens; row += 8 * warps) {
      keys.prepare(row, row, head.prepared, 1);
    }
  }
  wait_copies<0>();
  __syncthreads();
  while (first < tokens) {
    if (a.preparation) {
      for (int row = 0; row < kQueries<kDim>; row += 8) {
        rows.prepare(row, first + row, head.prepared, 0);
      }
      __syncwarp();
    }
    if (first + 16 < tokens) {
      head.template attend<kTiles<kDim>>(a, index, first);
    } else {
      head.template attend<1>(a, index, first);
    }
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
  Queries<T, kDim, kTiles<kDim>> queries(rows, a.scale);
  for (int from = 0; from < tokens; from += kStreamed) {
    __syncthreads();  // all see the keys from `from` on, and have done with those before
    copy(from + kStreamed);
    const int rest = tokens - from;
    if (first < tokens) {
      queries.attend(keys(from), values(from), rest < kStreamed ? rest : kStreamed);
    }
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
