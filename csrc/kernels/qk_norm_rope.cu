// qk_norm_rope and its gradient. The equations are in msf_kernels/qk_norm_rope/reference.py.
#include <algorithm>
#include <numeric>

#include "dispatch.cuh"
#include "partials.cuh"
#include "qk_norm_rope.hpp"
#include "quad_head.cuh"

namespace msf {
namespace {

constexpr int kMaxHeadDim = 256;

template <class T, class Share>
__device__ void load_parameter(Share& share, const Parameter& x, int64_t at,
                               const typename Share::Lanes& lanes) {
  if (x.dtype == DType::float32) {
    share.load(x.data.as<const float>() + at, lanes);
  } else {
    share.load(x.data.as<const T>() + at, lanes);
  }
}

template <class Share>
__device__ void rotate_head(Share& share, const Address& rope, const HeadGrid& grid, unsigned token,
                            const typename Share::Lanes& lanes, int sign) {
  const int half = grid.head_dim / 2;
  const float* cos = rope.as<const float>() + int64_t(token % grid.tokens) * half;
  Share angle;
  angle.load_angles(cos, cos + int64_t(grid.tokens) * half, lanes);
  rotate(share, angle, sign);
}

template <class T>
__device__ T* head_of(const HeadsView& x, const HeadGrid& grid, unsigned token, unsigned head) {
  return x.data.as<T>() + token / grid.tokens * x.batch + token % grid.tokens * x.token +
         head * x.head;
}

// Loads a head of q (part 0) or k (1) and adds its bias.
template <class T, class Share>
__device__ void load_raw(Share& x, const HeadsView& view, const Parameter& bias,
                         const HeadGrid& grid, int part, unsigned token, unsigned head,
                         const typename Share::Lanes& lanes) {
  x.load(head_of<const T>(view, grid, token, head), lanes);
  if (!bias.data) return;
  Share other;
  load_parameter<T>(other, bias, (int64_t(part) * grid.heads + head) * grid.head_dim, lanes);
  add(x, other);
}

// Of q, k or v, which has none. A choice of whole structs goes through local memory.
__device__ inline Parameter choose(const Parameter& q, const Parameter& k, int part) {
  if (part == 2) return {};
  return {part == 0 ? q.data : k.data, part == 0 ? q.dtype : k.dtype};
}

__device__ inline Parameter norm_weight(const Preparation& x, int part) {
  return choose(x.q_weight, x.k_weight, part);
}

__device__ inline Parameter norm_bias(const Preparation& x, int part) {
  return choose(x.q_norm_bias, x.k_norm_bias, part);
}

// Subtracts a head's mean, as LayerNorm does before RMS norm and in the gradient after it. The
// whole warp must call it together.
template <class Share>
__device__ void centre(Share& x, int dim, const typename Share::Lanes& lanes) {
  decltype(x.first[0] + x.first[0]) sum = 0;
#pragma unroll
  for (int i = 0; i < Share::kSize; ++i) sum += x.first[i] + x.second[i];
  x.subtract(lanes.sum(sum) / dim, lanes);
}

// A share of sums that a thread keeps in shared memory (2 * kSize, kThreads), where registers are
// short.
template <class Share, class C>
struct KeptShare {
  C* shared;

  __device__ C& at(int i) const { return shared[i * kThreads + threadIdx.x]; }

  __device__ void clear() const {
#pragma unroll
    for (int i = 0; i < 2 * Share::kSize; ++i) at(i) = 0;
  }
  __device__ void add(const Share& x) const {
#pragma unroll
    for (int i = 0; i < Share::kSize; ++i) {
      at(2 * i) += x.first[i];
      at(2 * i + 1) += x.second[i];
    }
  }
  __device__ Share read() const {
    Share x;
#pragma unroll
    for (int i = 0; i < Share::kSize; ++i) {
      x.first[i] = at(2 * i);
      x.second[i] = at(2 * i + 1);
    }
    return x;
  }
};

// Blocks are (heads, q or k).
// registers: 96
template <class T, class Share>
__global__ void qk_norm_rope_kernel(HeadGrid grid, typename Share::Lanes spread,
                                    HeadsView q,  // (B, N, H, d)
                                    HeadsView k,  // (B, N, H, d)
                                    Preparation preparation,
                                    T* q_out,    // (B, N, H, d)
                                    T* k_out) {  // (B, N, H, d)
  using C = Compute<T>;
  const auto lanes = spread.mine();
  const int part = blockIdx.y;
  const HeadsView x_view = part == 0 ? q : k;
  const Parameter norm = norm_weight(preparation, part);
  const unsigned index = blockIdx.x * lanes.heads() + lanes.head();
  const unsigned token = index / grid.heads, head = index % grid.heads;
  const bool exists = !lanes.idle() && token < unsigned(grid.batch) * grid.tokens;
  Share x, weight;
  if (exists) {
    load_raw<T>(x, x_view, preparation.bias, grid, part, token, head, lanes);
  }
  if (norm.data) {
    if (preparation.layer) centre(x, grid.head_dim, lanes);
    if (exists) load_parameter<T>(weight, norm, 0, lanes);
    normalise(x, weight, reciprocal_rms(x, grid.head_dim, C(preparation.eps), lanes));
  }
  if (!exists) return;
  if (const Parameter bias = norm_bias(preparation, part); bias.data) {
    load_parameter<T>(weight, bias, 0, lanes);
    add(x, weight);
  }
  if (preparation.rope) rotate_head(x, preparation.rope, grid, token, lanes, 1);
  x.store((part == 0 ? q_out : k_out) + int64_t(index) * grid.head_dim, lanes);
}

// Adds up the shares of the block's heads of which every `period`-th belongs together, counted from
// the first head of all blocks, and leaves the sums in this block's rows of partials (blocks, rows,
// d), in the order of the period.
template <class C, class Share>
__device__ void sum_heads(Share& own, C* shared, int period, int dim, C* partials,
                          const typename Share::Lanes& lanes) {
  const int heads = lanes.heads(), rows = period < heads ? period : heads;
  __syncthreads();
  if (!lanes.idle()) own.store(shared + lanes.head() * dim, lanes);
  __syncthreads();
  for (int i = threadIdx.x; i < rows * dim; i += kThreads) {
    C total = 0;
    for (int row = i / dim; row < heads; row += rows) total += shared[row * dim + i % dim];
    const int64_t first = int64_t(blockIdx.x) * heads;
    partials[(int64_t(blockIdx.x) * rows + (first + i / dim) % rows) * dim + i % dim] = total;
  }
}

// Blocks are (any number, over which the heads are dealt; q, k or v). They step by whole tokens if
// there is a bias, so that a thread always has the same head. Each leaves its sums of the gradients
// of the parameters in `norm_partials` (4, blocks, d), of weights and then biases of q and k, and
// `bias_partials` (3, blocks, rows, d), in the order of its heads.
//
// At 128 registers an SM has 512 threads, which read heads and gradients of 32 KB at once: more
// than the 20 KB that arrive in the 600 ns of a memory access. With 255 it has half as many, of
// which each reads 80 bytes of a head or more. Speed does not matter in double.
//
// registers: 128; 255 for <double, *>; 255 for <*Head<80>*>; 255 for <*<96>*>; 255 for <*<128>*>
template <class T, class Share>
__global__ void __launch_bounds__(kThreads, sizeof(T) < 8 && sizeof(Share) <= 72 ? 2 : 1)
    qk_norm_rope_backward_kernel(HeadGrid grid, typename Share::Lanes spread,
                                 HeadsView grad_q,  // (B, N, H, d)
                                 HeadsView grad_k,  // (B, N, H, d)
                                 HeadsView grad_v,  // (B, N, H, d) or absent
                                 HeadsView q,       // (B, N, H, d)
                                 HeadsView k,       // (B, N, H, d)
                                 Preparation preparation,
                                 T* grad_qkv,  // (B, N, 3, H, d)
                                 Compute<T>* norm_partials, Compute<T>* bias_partials) {
  using C = Compute<T>;
  const auto lanes = spread.mine();
  const int part = blockIdx.y;
  const HeadsView x_view = part == 0 ? q : k;
  const HeadsView grad_view = part == 0 ? grad_q : part == 1 ? grad_k : grad_v;
  const Parameter norm = norm_weight(preparation, part);
  const unsigned heads = unsigned(grid.batch) * grid.tokens * grid.heads;
  MSF_DYNAMIC_SHARED(C, shared);  // (heads of the block, d), and what is kept
  const bool has_norm_bias{norm_bias(preparation, part).data};
  const KeptShare<Share, C> grad_norm_bias{shared};
  if (has_norm_bias) grad_norm_bias.clear();
  Share weight, grad_weight, grad_bias;
  if (norm.data && !lanes.idle()) load_parameter<T>(weight, norm, 0, lanes);
  // All lanes of a warp go on until its last head, because they sum together.
  unsigned index = blockIdx.x * lanes.heads() + lanes.head();
  for (; index - lanes.group < heads; index += gridDim.x * lanes.heads()) {
    const bool exists = !lanes.idle() && index < heads;
    const unsigned token = index / grid.heads, head = index % grid.heads;
    Share grad, x;
    if (exists && grad_view.data) grad.load(head_of<const T>(grad_view, grid, token, head), lanes);
    if (exists && part < 2 && preparation.rope) {
      rotate_head(grad, preparation.rope, grid, token, lanes, -1);
    }
    if (has_norm_bias) grad_norm_bias.add(grad);
    if (norm.data) {
      if (exists) load_raw<T>(x, x_view, preparation.bias, grid, part, token, head, lanes);
      if (preparation.layer) centre(x, grid.head_dim, lanes);
      // A head that does not exist adds nothing, also where eps is 0.
      const C rrms = reciprocal_rms(x, grid.head_dim, C(preparation.eps), lanes);
      norm_backward(grad, x, weight, exists ? rrms : C(0), grid.head_dim, lanes);
      add(grad_weight, x);
      if (preparation.layer) centre(grad, grid.head_dim, lanes);
    }
    if (bias_partials) add(grad_bias, grad);
    const int64_t row = (int64_t(token) * 3 + part) * grid.heads + head;
    if (exists) grad.store(grad_qkv + row * grid.head_dim, lanes);
  }
  const int64_t sums_of_part = int64_t(gridDim.x) * grid.head_dim;
  if (has_norm_bias) {
    Share sum = grad_norm_bias.read();
    C* const sums = norm_partials + (2 + part) * sums_of_part;
    sum_heads(sum, shared, 1, grid.head_dim, sums, lanes);
  }
  if (norm.data) {
    C* const sums = norm_partials + part * sums_of_part;
    sum_heads(grad_weight, shared, 1, grid.head_dim, sums, lanes);
  }
  if (bias_partials) {
    const int rows = grid.heads < lanes.heads() ? grid.heads : lanes.heads();
    C* const sums = bias_partials + int64_t(part) * gridDim.x * rows * grid.head_dim;
    sum_heads(grad_bias, shared, grid.heads, grid.head_dim, sums, lanes);
  }
}

// Says whether vectors of `vector` elements can be read everywhere in these heads.
bool divisible(int vector, size_t bytes, std::initializer_list<HeadsView> views) {
  for (const HeadsView& x : views) {
    if (!x.data) continue;
    if (x.batch % vector || x.token % vector || x.head % vector) return false;
    if (reinterpret_cast<uintptr_t>(x.data.value) % (vector * bytes)) return false;
  }
  return true;
}

// Calls body(type, Type<Share>{}), with the share of a head that a lane holds: of a quad's in 16
// bits where attention has one, else in vectors of 16 bytes where half a head has a whole number,
// at most one for each lane of a warp. Where an address or a stride does not allow that it is in
// single elements.
template <class Body>
void with_heads(DType dtype, const HeadGrid& grid, std::initializer_list<HeadsView> views,
                std::initializer_list<Address> addresses, Body body) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using C = Compute<T>;
    constexpr int kVector = 16 / sizeof(T), kTurns = kMaxHeadDim / 2 / kWarp;
    const int dim = grid.head_dim;
    if (is_aligned(addresses) && divisible(kVector, sizeof(T), views)) {
      if constexpr (sizeof(T) == 2) {
        if (with_head_dim(dim, [&](auto built) { body(type, Type<QuadHead<built.value>>{}); })) {
          return;
        }
      }
      if (dim % (2 * kVector) == 0 && dim / 2 / kVector <= kWarp) {
        return body(type, Type<Fragment<C, kVector, 1>>{});
      }
    }
    if (dim > kMaxHeadDim) throw std::runtime_error("msf: head_dim of more than 256");
    body(type, Type<Fragment<C, 1, kTurns>>{});
  });
}

int64_t count_heads(const HeadGrid& grid) {
  const int64_t heads = int64_t(grid.batch) * grid.tokens * grid.heads;
  if (heads >= int64_t(1) << 31) throw std::runtime_error("msf: 2^31 heads or more");
  return heads;
}

}  // namespace

void qk_norm_rope(DType dtype, HeadGrid grid, HeadsView q, HeadsView k, Preparation preparation,
                  Address q_out, Address k_out, Address stream) {
  const int64_t heads = count_heads(grid);
  if (heads == 0) return;
  const auto& [bias, q_weight, k_weight, q_norm_bias, k_norm_bias, rope, eps, layer] = preparation;
  const auto addresses = {bias.data,        q_weight.data, k_weight.data, q_norm_bias.data,
                          k_norm_bias.data, rope,          q_out,         k_out};
  with_heads(dtype, grid, {q, k}, addresses, [&](auto type, auto share) {
    using T = typename decltype(type)::type;
    using Share = typename decltype(share)::type;
    const auto lanes = Share::lanes(grid.head_dim);
    const unsigned blocks = (heads + lanes.heads() - 1) / lanes.heads();
    launch<qk_norm_rope_kernel<T, Share>>(dim3(blocks, 2), dim3(kThreads), 0, cuda_stream(stream),
                                          grid, lanes, q, k, preparation, q_out.as<T>(),
                                          k_out.as<T>());
  });
}

void qk_norm_rope_backward(DType dtype, HeadGrid grid, HeadsView grad_q, HeadsView grad_k,
                           HeadsView grad_v, HeadsView q, HeadsView k, Preparation preparation,
                           Address grad_qkv, Address norm_partials, Address bias_partials,
                           int max_partials, PreparationGradient sums, Address stream) {
  const int64_t heads = count_heads(grid);
  const auto views = {grad_q, grad_k, grad_v, q, k};
  const auto& [bias, q_weight, k_weight, q_norm_bias, k_norm_bias, rope, eps, layer] = preparation;
  const auto addresses = {bias.data,        q_weight.data, k_weight.data, q_norm_bias.data,
                          k_norm_bias.data, rope,          grad_qkv};
  with_heads(dtype, grid, views, addresses, [&](auto type, auto share) {
    using T = typename decltype(type)::type;
    using C = Compute<T>;
    using Share = typename decltype(share)::type;
    const auto lanes = Share::lanes(grid.head_dim);
    const int64_t own = lanes.heads(), dim = grid.head_dim, all = (heads + own - 1) / own;
    const int64_t whole = bias_partials ? grid.heads / std::gcd(grid.heads, own) : 1;
    const int64_t count = (std::min<int64_t>(all, max_partials) + whole - 1) / whole * whole;
    const bool kept = preparation.q_norm_bias.data || preparation.k_norm_bias.data;
    const int64_t summed = norm_partials || bias_partials ? own * dim : 0;
    const size_t shared = (kept ? 2 * Share::kSize * kThreads : summed) * sizeof(C);
    if (heads > 0) {
      launch<qk_norm_rope_backward_kernel<T, Share>>(
          dim3(count, 3), dim3(kThreads), shared, cuda_stream(stream), grid, lanes, grad_q, grad_k,
          grad_v, q, k, preparation, grad_qkv.as<T>(), norm_partials.as<C>(),
          bias_partials.as<C>());
    }
    if (norm_partials) {
      auto total = [&](int part, const Parameter& sum) -> PartialSums<C> {
        if (!sum.data) return {};
        const C* first = norm_partials.as<const C>() + part * count * dim;
        return {first, sum.data, sum.dtype, 1, count};
      };
      sum_partials<C>(dim,
                      {total(0, sums.q_weight), total(1, sums.k_weight), total(2, sums.q_norm_bias),
                       total(3, sums.k_norm_bias)},
                      stream);
    }
    if (bias_partials) {
      const int64_t rows = count * std::min<int64_t>(grid.heads, own);  // of each part
      const PartialSums<C> total{bias_partials.as<const C>(), sums.bias.data, sums.bias.dtype, 3,
                                 rows / grid.heads};
      sum_partials<C>(grid.heads * dim, {total, {}, {}, {}}, stream);
    }
  });
}

}  // namespace msf
