// The gradients of adaln_modulate, gate_residual and gate_residual_adaln, in one pass over memory
// and without atomics. A block sums over its tokens in registers, a second kernel sums over the
// blocks. The equations are in msf_kernels/adaln/reference.py.
#include "adaln.cuh"
#include "partials.cuh"

namespace msf {
namespace {

// The gradients of gate, shift and scale are sums over tokens, in this order everywhere.
constexpr int kGateSum = 0, kShiftSum = 1, kScaleSum = 2, kSums = 3;

// In the second pass 8 threads share a channel, and each adds up every eighth part.
constexpr int kGroups = 8;

template <class T, class Y, class M>
struct BackwardArguments {
  const T* grad_h;                // (B, N, D)
  const T* grad_x_out;            // (B, N, D) or absent
  const T* x;                     // (B, N, D)
  const Y* y;                     // (B, N, D)
  ModulationRows<M> gate, scale;  // (B, D)
  const Compute<T>* mean;         // (B, N)
  const Compute<T>* rstd;         // (B, N)
  T* grad_x;                      // (B, N, D)
  Y* grad_y;                      // (B, N, D)
  M* sums[kSums];                 // (B, D) each, written if there are no partials
  Compute<T>* partials;           // (kSums, B * slices, D) or absent
};

// The channels of one token that a thread holds in registers.
template <class T, class Y, class M, int kVector, int kItems, bool kGate, bool kNorm>
struct Token {
  using C = Compute<T>;
  Vector<T, kVector> grad_h[kItems] = {}, grad_x_out[kItems] = {}, x[kItems] = {};
  Vector<Y, kVector> y[kItems] = {};
  C mean = 0, rstd = 0;

  __device__ void load_norm(const BackwardArguments<T, Y, M>& args, int i, int64_t offset) {
    grad_h[i] = grad_h[i].load(args.grad_h + offset);
    x[i] = x[i].load(args.x + offset);
  }
  __device__ void load_residual(const BackwardArguments<T, Y, M>& args, int i, int64_t offset) {
    if (args.grad_x_out) grad_x_out[i] = grad_x_out[i].load(args.grad_x_out + offset);
    if constexpr (kGate) y[i] = y[i].load(args.y + offset);
  }

  // These are the normalised x, and the gradient of the loss by it.
  __device__ C normalised(int i, int k) const { return (to_compute(x[i][k]) - mean) * rstd; }
  __device__ C grad(int i, int k, M scale) const {
    return to_compute(grad_h[i][k]) * (1 + to_compute(scale));
  }
};

// Stores a thread's sums over the tokens of its block. If the block has all tokens they are the
// gradient, else a part of it for the second kernel.
template <class T, class Y, class M, int kVector, int kItems>
__device__ void store_sum(const Compute<T> (&total)[kItems][kVector],
                          const BackwardArguments<T, Y, M>& args,
                          const Channels<kVector, kItems>& channels, int sum) {
  const int64_t parts = int64_t(gridDim.x) * gridDim.y;
  const int64_t part = int64_t(blockIdx.x) * gridDim.y + blockIdx.y;
  channels.each([&](int i, int c) {
    Vector<Compute<T>, kVector> partial;
    Vector<M, kVector> whole;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      partial[k] = total[i][k];
      whole[k] = from_compute<M>(total[i][k]);
    }
    if (args.partials) {
      partial.store(args.partials + (sum * parts + part) * channels.count + c);
    } else {
      whole.store(args.sums[sum] + part * channels.count + c);
    }
  });
}

// Blocks are (samples, slices).
// registers: 128
template <class T, class Y, class M, int kVector, int kItems, bool kGate, bool kNorm>
__global__ void __launch_bounds__(kMaxThreads, 1)
    gate_residual_adaln_backward_kernel(TokenSlices size, BackwardArguments<T, Y, M> args) {
  using C = Compute<T>;
  using Token = Token<T, Y, M, kVector, kItems, kGate, kNorm>;
  constexpr int kRows = rows_at_once<T, kVector, kItems>(8);
  constexpr bool kLate = kVector * kItems > 8;  // the registers do not hold a whole token
  MSF_SHARED(C, shared, 2 * 2 * kRows * kMaxWarps);
  const Slice slice(size);
  const Channels<kVector, kItems> channels{size.channels};
  C totals[kSums][kItems][kVector] = {};
  for (int64_t row = slice.first; row < slice.end; row += kRows) {
    Token tokens[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= slice.end) break;
      if constexpr (kNorm) {
        tokens[r].mean = args.mean[row + r];
        tokens[r].rstd = args.rstd[row + r];
      }
      channels.each([&](int i, int c) {
        const int64_t offset = (row + r) * size.channels + c;
        if constexpr (kNorm) tokens[r].load_norm(args, i, offset);
        if constexpr (!kLate) tokens[r].load_residual(args, i, offset);
      });
    }
    // Two means over the channels of each token: of its gradient, and of its gradient times the
    // normalised x.
    C means[2 * kRows] = {};
    if constexpr (kNorm) {
      channels.each([&](int i, int c) {
        const auto scale = Vector<M, kVector>::load(args.scale[slice.sample] + c);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            const C grad_h = to_compute(tokens[r].grad_h[i][k]);
            const C normalised = tokens[r].normalised(i, k), grad = tokens[r].grad(i, k, scale[k]);
            means[2 * r] += grad;
            means[2 * r + 1] += grad * normalised;
            totals[kShiftSum][i][k] += grad_h;
            totals[kScaleSum][i][k] += grad_h * normalised;
          }
        }
      });
      // The turns take the halves of the memory alternately, because a warp that is ahead must not
      // write where others still read.
      const int64_t turn = (row - slice.first) / kRows % 2;
      sum_over_block(means, shared + turn * 2 * kRows * kMaxWarps);
#pragma unroll
      for (int m = 0; m < 2 * kRows; ++m) means[m] /= size.channels;
    }
    channels.each([&](int i, int c) {
      Vector<M, kVector> scale, gate;
      if constexpr (kNorm) scale = scale.load(args.scale[slice.sample] + c);
      if constexpr (kGate) gate = gate.load(args.gate[slice.sample] + c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row + r >= slice.end) break;
        Token& token = tokens[r];
        const int64_t offset = (row + r) * size.channels + c;
        if constexpr (kLate) token.load_residual(args, i, offset);
        Vector<T, kVector> grad_x;
        Vector<Y, kVector> grad_y;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          C grad = 0;
          if constexpr (kNorm) {
            grad = token.grad(i, k, scale[k]) - means[2 * r];
            grad = (grad - token.normalised(i, k) * means[2 * r + 1]) * token.rstd;
          }
          grad += to_compute(token.grad_x_out[i][k]);
          if constexpr (kNorm) grad_x[k] = from_compute<T>(grad);
          if constexpr (kGate) {
            grad_y[k] = from_compute<Y>(grad * to_compute(gate[k]));
            totals[kGateSum][i][k] += grad * to_compute(token.y[i][k]);
          }
        }
        if constexpr (kNorm) grad_x.store(args.grad_x + offset);
        if constexpr (kGate) grad_y.store(args.grad_y + offset);
      }
    });
  }
  if constexpr (kGate) store_sum(totals[kGateSum], args, channels, kGateSum);
  if constexpr (kNorm) store_sum(totals[kShiftSum], args, channels, kShiftSum);
  if constexpr (kNorm) store_sum(totals[kScaleSum], args, channels, kScaleSum);
}

// Sums the partial sums (kSums, B * slices, D) to gradients (B, D) or, where all samples share the
// modulation, (1, D).
template <class T>
void sum_over_slices(const TokenSlices& size, DType dtype, Address partials,
                     const ModulationGradient (&grads)[kSums], Address stream) {
  const int64_t parts = int64_t(size.batch) * slices(size);
  auto sums = [&](int i) -> PartialSums<Compute<T>> {
    if (!grads[i].data) return {};
    const Compute<T>* first = partials.as<const Compute<T>>() + i * parts * size.channels;
    if (grads[i].shared) return {first, grads[i].data, dtype, 1, parts};
    return {first, grads[i].data, dtype, size.batch, slices(size)};
  };
  sum_partials<T, kGroups>(size.channels, size.batch,
                           {sums(kGateSum), sums(kShiftSum), sums(kScaleSum)}, stream);
}

}  // namespace

void gate_residual_adaln_backward(AdalnTypes types, TokenSlices size, Address grad_h,
                                  Address grad_x_out, Address x, Address y, Modulation gate,
                                  Modulation scale, Address mean, Address rstd, Address grad_x,
                                  Address grad_y, ModulationGradient grad_gate,
                                  ModulationGradient grad_shift, ModulationGradient grad_scale,
                                  Address partials, Address stream) {
  const ModulationGradient grads[kSums] = {grad_gate, grad_shift, grad_scale};
  if (size.batch == 0 || size.tokens == 0 || size.channels == 0) return;
  with_adaln_types(types, [&](auto x_type, auto y_type, auto modulation_type) {
    using T = typename decltype(x_type)::type;
    using Y = typename decltype(y_type)::type;
    using M = typename decltype(modulation_type)::type;
    using C = Compute<T>;
    const BackwardArguments<T, Y, M> arguments{
        grad_h.as<const T>(),
        grad_x_out.as<const T>(),
        x.as<const T>(),
        y.as<const Y>(),
        gate,
        scale,
        mean.as<const C>(),
        rstd.as<const C>(),
        grad_x.as<T>(),
        grad_y.as<Y>(),
        {grads[0].data.as<M>(), grads[1].data.as<M>(), grads[2].data.as<M>()},
        partials.as<C>()};
    const bool aligned = is_aligned({grad_h, grad_x_out, x, y, grad_x, grad_y, grads[0].data,
                                     grads[1].data, grads[2].data, partials}) &&
                         arguments.gate.is_aligned() && arguments.scale.is_aligned();
    with_channels<T>(size.channels, aligned, [&](auto vector, auto items, int threads) {
      constexpr int kVector = vector.value, kItems = items.value;
      auto start = [&](auto gate, auto norm) {
        launch<
            gate_residual_adaln_backward_kernel<T, Y, M, kVector, kItems, gate.value, norm.value>>(
            dim3(size.batch, slices(size)), dim3(threads), 0, cuda_stream(stream), size, arguments);
      };
      if (y && grad_h) {
        start(std::true_type{}, std::true_type{});
      } else if (y) {
        start(std::true_type{}, std::false_type{});
      } else if constexpr (std::is_same_v<T, Y>) {
        start(std::false_type{}, std::true_type{});
      }
    });
    if (partials) sum_over_slices<T>(size, types.modulation, partials, grads, stream);
  });
}

}  // namespace msf
