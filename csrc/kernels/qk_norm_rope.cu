// qk_norm_rope and its gradient. The equations are in msf_kernels/qk_norm_rope/reference.py.
#include "dispatch.cuh"
#include "heads.cuh"
#include "partials.cuh"

namespace msf {
namespace {

constexpr int kMaxHeadDim = 256;

// In the second pass 32 threads share an element, so that 32 partial sums are read at the same
// time: it has few blocks, at head_dim 64 two for q and two for k.
constexpr int kGroups = 32;

template <class T, class S>
__device__ void load_weight(S& share, const NormWeight& weight, const Lanes& lanes) {
  if (weight.dtype == DType::float32) {
    share.load(weight.data.as<const float>(), lanes);
  } else {
    share.load(weight.data.as<const T>(), lanes);
  }
}

template <class S>
__device__ void rotate(S& share, const float* rope, const HeadGrid& grid, unsigned token,
                       const Lanes& lanes, int sign) {
  const int64_t at = int64_t(token % grid.tokens) * lanes.half;
  S angle;
  angle.load_angles(rope + at, rope + int64_t(grid.tokens) * lanes.half + at, lanes);
  share.rotate(angle, sign);
}

template <class T>
__device__ T* head_of(const HeadsView& x, const HeadGrid& grid, unsigned token, unsigned head) {
  return x.data.as<T>() + token / grid.tokens * x.batch + token % grid.tokens * x.token +
         head * x.head;
}

// Blocks are (heads, q or k).
// registers: 96
template <class T, int kVector, int kTurns>
__global__ void qk_norm_rope_kernel(HeadGrid grid, Lanes spread,
                                    HeadsView q,          // (B, N, H, d)
                                    HeadsView k,          // (B, N, H, d)
                                    NormWeight q_weight,  // (d,) or absent
                                    NormWeight k_weight,  // (d,) or absent
                                    const float* rope,    // (2, N, d / 2) or absent
                                    Compute<T> eps,
                                    T* q_out,    // (B, N, H, d)
                                    T* k_out) {  // (B, N, H, d)
  using C = Compute<T>;
  using Fragment = msf::Fragment<C, kVector, kTurns>;
  const Lanes lanes = spread.mine();
  const HeadsView x_view = blockIdx.y == 0 ? q : k;
  const NormWeight norm = blockIdx.y == 0 ? q_weight : k_weight;
  const unsigned index = blockIdx.x * lanes.heads() + lanes.head();
  const unsigned token = index / grid.heads, head = index % grid.heads;
  const bool exists = !lanes.idle() && token < unsigned(grid.batch) * grid.tokens;
  Fragment x, weight;
  if (exists) x.load(head_of<const T>(x_view, grid, token, head), lanes);
  if (norm.data) {
    if (exists) load_weight<T>(weight, norm, lanes);
    const C rrms = reciprocal_root(lanes.sum(sum_of_squares(x)) / grid.head_dim + eps);
#pragma unroll
    for (int i = 0; i < Fragment::kSize; ++i) {
      x.first[i] = x.first[i] * rrms * weight.first[i];
      x.second[i] = x.second[i] * rrms * weight.second[i];
    }
  }
  if (!exists) return;
  if (rope) rotate(x, rope, grid, token, lanes, 1);
  x.store((blockIdx.y == 0 ? q_out : k_out) + int64_t(index) * grid.head_dim, lanes);
}

// Replaces `grad`, the gradient of one normalised head of x, by that of x, and adds to the gradient
// of the weight. A head that does not exist adds nothing, also where eps is 0.
template <class S, class C>
__device__ void norm_backward(S& grad, S& x, const S& weight, S& grad_weight, C eps, int head_dim,
                              bool exists, const Lanes& lanes) {
  const C mean_square = lanes.sum(sum_of_squares(x)) / head_dim;
  const C rrms = exists ? reciprocal_root(mean_square + eps) : C(0);
  C along = 0;
#pragma unroll
  for (int i = 0; i < S::kSize; ++i) {
    x.first[i] *= rrms;
    x.second[i] *= rrms;
    grad_weight.first[i] += grad.first[i] * x.first[i];
    grad_weight.second[i] += grad.second[i] * x.second[i];
    grad.first[i] *= weight.first[i];
    grad.second[i] *= weight.second[i];
    along += grad.first[i] * x.first[i] + grad.second[i] * x.second[i];
  }
  along = lanes.sum(along) / head_dim;
#pragma unroll
  for (int i = 0; i < S::kSize; ++i) {
    grad.first[i] = (grad.first[i] - x.first[i] * along) * rrms;
    grad.second[i] = (grad.second[i] - x.second[i] * along) * rrms;
  }
}

// Blocks are (any number, over which the heads are dealt; q, k or v). Each leaves the sum of its
// gradients of a norm weight in `partials`, in the order of its heads.
//
// At 128 registers an SM has 512 threads, which read heads and gradients of 32 KB at once: more
// than the 20 KB that arrive in the 600 ns of a memory access. Speed does not matter in double.
// registers: 128; 255 for <double, *>
template <class T, int kVector, int kTurns>
__global__ void __launch_bounds__(kThreads, sizeof(T) < 8 ? 2 : 1)
    qk_norm_rope_backward_kernel(HeadGrid grid, Lanes spread,
                                 HeadsView grad_q,     // (B, N, H, d)
                                 HeadsView grad_k,     // (B, N, H, d)
                                 HeadsView grad_v,     // (B, N, H, d) or absent
                                 HeadsView q,          // (B, N, H, d)
                                 HeadsView k,          // (B, N, H, d)
                                 NormWeight q_weight,  // (d,) or absent
                                 NormWeight k_weight,  // (d,) or absent
                                 const float* rope,    // (2, N, d / 2) or absent
                                 Compute<T> eps,
                                 T* grad_qkv,             // (B, N, 3, H, d)
                                 Compute<T>* partials) {  // (2, blocks, d) or absent
  using C = Compute<T>;
  using Fragment = msf::Fragment<C, kVector, kTurns>;
  const Lanes lanes = spread.mine();
  const int part = blockIdx.y;
  const HeadsView grad_view = part == 0 ? grad_q : part == 1 ? grad_k : grad_v;
  const HeadsView x_view = part == 0 ? q : k;
  const NormWeight norm = part == 0 ? q_weight : part == 1 ? k_weight : NormWeight{};
  const unsigned heads = unsigned(grid.batch) * grid.tokens * grid.heads;
  Fragment weight, grad_weight;
  if (norm.data && !lanes.idle()) load_weight<T>(weight, norm, lanes);
  // All lanes of a warp go on until its last head, because they sum together.
  unsigned index = blockIdx.x * lanes.heads() + lanes.head();
  for (; index - lanes.group < heads; index += gridDim.x * lanes.heads()) {
    const bool exists = !lanes.idle() && index < heads;
    const unsigned token = index / grid.heads, head = index % grid.heads;
    Fragment grad, x;
    if (exists && grad_view.data) grad.load(head_of<const T>(grad_view, grid, token, head), lanes);
    if (exists && part < 2 && rope) rotate(grad, rope, grid, token, lanes, -1);
    if (norm.data) {
      if (exists) x.load(head_of<const T>(x_view, grid, token, head), lanes);
      norm_backward(grad, x, weight, grad_weight, eps, grid.head_dim, exists, lanes);
    }
    const int64_t row = (int64_t(token) * 3 + part) * grid.heads + head;
    if (exists) grad.store(grad_qkv + row * grid.head_dim, lanes);
  }
  if (!norm.data) return;
  MSF_DYNAMIC_SHARED(C, sums);  // (heads of the block, d)
  if (!lanes.idle()) grad_weight.store(sums + lanes.head() * grid.head_dim, lanes);
  __syncthreads();
  for (int i = threadIdx.x; i < grid.head_dim; i += kThreads) {
    C total = 0;
    for (int row = 0; row < lanes.heads(); ++row) total += sums[row * grid.head_dim + i];
    partials[(int64_t(part) * gridDim.x + blockIdx.x) * grid.head_dim + i] = total;
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

// Calls body(type, vector, turns) with the widest vectors that every address and stride allows, and
// of which half a head has a whole number, at most one for each lane of a warp; else with single
// elements.
template <class Body>
void with_heads(DType dtype, const HeadGrid& grid, std::initializer_list<HeadsView> views,
                std::initializer_list<Address> addresses, Body body) {
  with_type(dtype, [&](auto type) {
    constexpr int kBytes = sizeof(typename decltype(type)::type), kVector = 16 / kBytes;
    auto fits = [&](int vector) {
      return grid.head_dim % (2 * vector) == 0 && grid.head_dim / 2 / vector <= kWarp &&
             is_aligned(addresses) && divisible(vector, kBytes, views);
    };
    using One = std::integral_constant<int, 1>;
    if (fits(kVector)) return body(type, std::integral_constant<int, kVector>{}, One{});
    if constexpr (kBytes == 2) {
      if (fits(4)) return body(type, std::integral_constant<int, 4>{}, One{});
    }
    if (grid.head_dim > kMaxHeadDim) throw std::runtime_error("msf: head_dim of more than 256");
    body(type, One{}, std::integral_constant<int, kMaxHeadDim / 2 / kWarp>{});
  });
}

int64_t count_heads(const HeadGrid& grid) {
  const int64_t heads = int64_t(grid.batch) * grid.tokens * grid.heads;
  if (heads >= int64_t(1) << 31) throw std::runtime_error("msf: 2^31 heads or more");
  return heads;
}

}  // namespace

void qk_norm_rope(DType dtype, HeadGrid grid, HeadsView q, HeadsView k, NormWeight q_weight,
                  NormWeight k_weight, Address rope, double eps, Address q_out, Address k_out,
                  Address stream) {
  const int64_t heads = count_heads(grid);
  if (heads == 0) return;
  const auto addresses = {q_weight.data, k_weight.data, rope, q_out, k_out};
  with_heads(dtype, grid, {q, k}, addresses, [&](auto type, auto vector, auto turns) {
    using T = typename decltype(type)::type;
    const Lanes lanes(grid.head_dim, vector.value);
    const unsigned blocks = (heads + lanes.heads() - 1) / lanes.heads();
    launch<qk_norm_rope_kernel<T, vector.value, turns.value>>(
        dim3(blocks, 2), dim3(kThreads), 0, cuda_stream(stream), grid, lanes, q, k, q_weight,
        k_weight, rope.as<const float>(), Compute<T>(eps), q_out.as<T>(), k_out.as<T>());
  });
}

void qk_norm_rope_backward(DType dtype, HeadGrid grid, HeadsView grad_q, HeadsView grad_k,
                           HeadsView grad_v, HeadsView q, HeadsView k, NormWeight q_weight,
                           NormWeight k_weight, Address rope, double eps, Address grad_qkv,
                           Address partials, int max_partials, NormWeight grad_q_weight,
                           NormWeight grad_k_weight, Address stream) {
  const int64_t heads = count_heads(grid);
  const auto views = {grad_q, grad_k, grad_v, q, k};
  const auto addresses = {q_weight.data, k_weight.data, rope, grad_qkv};
  with_heads(dtype, grid, views, addresses, [&](auto type, auto vector, auto turns) {
    using T = typename decltype(type)::type;
    using C = Compute<T>;
    const Lanes lanes(grid.head_dim, vector.value);
    const int64_t blocks = (heads + lanes.heads() - 1) / lanes.heads();
    const unsigned count = blocks < max_partials ? blocks : max_partials;
    const size_t shared = partials ? lanes.heads() * grid.head_dim * sizeof(C) : 0;
    if (heads > 0) {
      launch<qk_norm_rope_backward_kernel<T, vector.value, turns.value>>(
          dim3(count, 3), dim3(kThreads), shared, cuda_stream(stream), grid, lanes, grad_q, grad_k,
          grad_v, q, k, q_weight, k_weight, rope.as<const float>(), C(eps), grad_qkv.as<T>(),
          partials.as<C>());
    }
    if (partials) {
      auto sums = [&](int i, const NormWeight& grad) -> PartialSums<C> {
        if (!grad.data) return {};
        const C* first = partials.as<const C>() + int64_t(i) * count * grid.head_dim;
        return {first, grad.data, grad.dtype, 1, count};
      };
      sum_partials<T, kGroups>(grid.head_dim, 1,
                               {sums(0, grad_q_weight), sums(1, grad_k_weight), {}}, stream);
    }
  });
}

}  // namespace msf
