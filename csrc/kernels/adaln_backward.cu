// The gradients of adaln_modulate, gate_residual and gate_residual_adaln, in one pass over memory
// and without atomics. A block sums over its tokens in registers, a second kernel sums over the
// blocks. The equations are in msf_kernels/adaln/reference.py.
//
// A block has one row or two at a time, so that a thread's sums of its 8 channels fit into 32
// registers. While its threads meet at the barrier of a step, two rows of y and of x_out's gradient
// are on their way for the rest of it, and two of x and of h's gradient for the next step: in 16
// bits 128 bytes a thread, at 1152 channels and three blocks an SM 55 KB, twice what memory needs.
#include "adaln.cuh"
#include "partials.cuh"

namespace msf {
namespace {

// Sums over tokens, in this order everywhere: of the gradient of x_out, of that times y, and of the
// gradients of shift and scale. The first two give the gradients of y_bias and gate.
constexpr int kGradSum = 0, kGateSum = 1, kShiftSum = 2, kScaleSum = 3, kSums = 4;

template <class T, class Y, class M>
struct BackwardArguments {
  const T* grad_h;                // (B, N, D)
  const T* grad_x_out;            // (B, N, D) or absent
  const T* x;                     // (B, N, D)
  const Y* y;                     // (B, N, D)
  Parameter y_bias;               // (D,) or absent
  ModulationRows<M> gate, scale;  // (B, D)
  const Compute<T>* mean;         // (B, N)
  const Compute<T>* rstd;         // (B, N)
  bool rms;                       // the mean was not subtracted
  T* grad_x;                      // (B, N, D)
  Y* grad_y;                      // (B, N, D)
  M* sums[kSums];                 // (B, D) each, written if there are no partials
  Compute<T>* partials;           // (kSums, B * slices, D) or absent
};

// What a thread holds of kRows tokens behind the norm, zero for those that do not exist.
template <class T, int kVector, int kItems, int kRows>
struct Normalised {
  using C = Compute<T>;
  Packed<T, kVector> grad_h[kRows][kItems] = {}, x[kRows][kItems] = {};
  C mean[kRows] = {}, rstd[kRows] = {};

  template <class Args, class Channels>
  __device__ void load(const Args& args, const Channels& channels, int64_t row, int64_t end) {
    channels.load(grad_h, args.grad_h, row, end);
    channels.load(x, args.x, row, end);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= end) continue;
      mean[r] = args.mean[row + r];
      rstd[r] = args.rstd[row + r];
    }
  }

  __device__ C value(int r, int i, int k) const { return (x[r][i][k] - mean[r]) * rstd[r]; }
};

// What it holds of one item beside the norm, of tokens of `count` channels from channel c on.
template <class T, class Y, int kVector, int kRows>
struct Beside {
  Packed<T, kVector> grad_x_out[kRows] = {};
  Packed<Y, kVector> y[kRows] = {};

  template <bool kGate, class Args>
  __device__ void load(const Args& args, int count, int c, int64_t row, int64_t end) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= end) continue;
      const int64_t offset = (row + r) * count + c;
      if (args.grad_x_out) grad_x_out[r] = grad_x_out[r].load(args.grad_x_out + offset);
      if constexpr (kGate) y[r] = y[r].load(args.y + offset);
    }
  }
};

// What a thread sums over the tokens of its block.
template <class T, class Y, class M, int kVector, int kItems>
class Totals {
  using C = Compute<T>;
  using Args = BackwardArguments<T, Y, M>;
  using Channels = msf::Channels<kVector, kItems, true>;
  C sums[kSums][kItems][kVector] = {};

 public:
  // Adds to the sums behind the norm, and to the two means over the channels of each token: of the
  // gradient by the normalised x, and of that times the normalised x.
  template <int kRows>
  __device__ void add_normalised(const Normalised<T, kVector, kItems, kRows>& rows,
                                 const Args& args, const Channels& channels, int sample,
                                 C (&means)[2 * kRows]) {
    channels.each([&](int i, int c) {
      const auto scale = Packed<M, kVector>::load(args.scale[sample] + c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const C grad_h = rows.grad_h[r][i][k], normalised = rows.value(r, i, k);
          const C grad = grad_h * (1 + scale[k]);
          means[2 * r] += grad;
          means[2 * r + 1] = fused_multiply_add(grad, normalised, means[2 * r + 1]);
          sums[kShiftSum][i][k] += grad_h;
          sums[kScaleSum][i][k] = fused_multiply_add(grad_h, normalised, sums[kScaleSum][i][k]);
        }
      }
    });
  }

  // Stores the gradients of x and y of an item's channels, and adds to the sums behind the gate.
  template <bool kGate, bool kNorm, int kRows>
  __device__ void add_gated(const Normalised<T, kVector, kItems, kRows>& rows,
                            const Beside<T, Y, kVector, kRows>& beside, const Args& args, int i,
                            int c, const Channels& channels, int sample, int64_t row, int64_t end,
                            const C (&means)[2 * kRows]) {
    Packed<M, kVector> scale = {}, gate = {};
    if constexpr (kNorm) scale = scale.load(args.scale[sample] + c);
    if constexpr (kGate) gate = gate.load(args.gate[sample] + c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      C grad[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        grad[k] = beside.grad_x_out[r][k];
        if constexpr (kNorm) {
          const C centred = rows.grad_h[r][i][k] * (1 + scale[k]) - means[2 * r];
          const C along = rows.value(r, i, k) * means[2 * r + 1];
          grad[k] = fused_multiply_add(centred - along, rows.rstd[r], grad[k]);
        }
        if constexpr (kGate) {
          sums[kGradSum][i][k] += grad[k];
          sums[kGateSum][i][k] = fused_multiply_add(grad[k], beside.y[r][k], sums[kGateSum][i][k]);
        }
      }
      if (row + r >= end) continue;
      const int64_t offset = (row + r) * channels.count + c;
      if constexpr (kNorm) {
        Packed<T, kVector>::of([&](int k) { return grad[k]; }).store(args.grad_x + offset);
      }
      if constexpr (kGate) {
        Packed<Y, kVector>::of([&](int k) {
          return grad[k] * gate[k];
        }).store(args.grad_y + offset);
      }
    }
  }

  template <bool kGate, bool kNorm>
  __device__ void store(const Args& args, const Channels& channels, int sample) {
    channels.each([&](int i, int c) {
      if (kGate && args.y_bias.data) {
        // The sum of grad * (y + y_bias) is that of grad * y, and y_bias times that of grad. The
        // gradient of y_bias is the gate, which all tokens of a block share, times that of grad.
        const auto gate = Packed<M, kVector>::load(args.gate[sample] + c);
        const auto bias = load_parameter<Y, kVector>(args.y_bias, c);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          C &grad = sums[kGradSum][i][k], &total = sums[kGateSum][i][k];
          total = fused_multiply_add(grad, bias[k], total);
          grad *= gate[k];
        }
        store_sum(kGradSum, i, c, args, channels);
      }
      if constexpr (kGate) store_sum(kGateSum, i, c, args, channels);
      if constexpr (kNorm) store_sum(kShiftSum, i, c, args, channels);
      if constexpr (kNorm) store_sum(kScaleSum, i, c, args, channels);
    });
  }

 private:
  // If the block has all tokens its sum is the gradient, else a part of it for the second kernel.
  __device__ void store_sum(int sum, int i, int c, const Args& args,
                            const Channels& channels) const {
    const int64_t parts = int64_t(gridDim.x) * gridDim.y;
    const int64_t part = int64_t(blockIdx.x) * gridDim.y + blockIdx.y;
    const auto value = [&](int k) { return sums[sum][i][k]; };
    if (args.partials) {
      C* const partial = args.partials + (sum * parts + part) * channels.count + c;
      Packed<C, kVector>::of(value).store(partial);
    } else {
      Packed<M, kVector>::of(value).store(args.sums[sum] + part * channels.count + c);
    }
  }
};

// registers: 128
template <class T, class Y, class M, int kVector, int kItems, bool kGate, bool kNorm>
__global__ void __launch_bounds__(kMaxThreads, 1)
    gate_residual_adaln_backward_kernel(TokenSlices size, BackwardArguments<T, Y, M> args) {
  using C = Compute<T>;
  // Rows of 16 channels a thread leave no registers for what is not needed at once.
  constexpr bool kAhead = kVector * kItems <= 8 && sizeof(T) < 8;
  constexpr int kRows =
      kVector * kItems * (sizeof(T) > sizeof(Y) ? sizeof(T) : sizeof(Y)) <= 16 ? 2 : 1;
  MSF_SHARED(C, shared, 2 * 2 * kRows * kMaxWarps);
  const Slice slice(size);
  const Channels<kVector, kItems, true> channels{size.channels};
  Totals<T, Y, M, kVector, kItems> totals;
  Normalised<T, kVector, kItems, kRows> next;
  if constexpr (kNorm && kAhead) next.load(args, channels, slice.first, slice.end);
  bool odd = false;
  for (int64_t row = slice.first; row < slice.end; row += kRows) {
    Normalised<T, kVector, kItems, kRows> rows;
    Beside<T, Y, kVector, kRows> beside[kItems];
    auto load_beside = [&](int i, int c) {
      beside[i].template load<kGate>(args, size.channels, c, row, slice.end);
    };
    if constexpr (kAhead) channels.each(load_beside);
    if constexpr (kNorm) {
      if constexpr (kAhead) {
        rows = next;
        next = {};
        next.load(args, channels, row + kRows, slice.end);
      } else {
        rows.load(args, channels, row, slice.end);
      }
    }
    C means[2 * kRows] = {};
    if constexpr (kNorm) {
      totals.add_normalised(rows, args, channels, slice.sample, means);
      // The steps take the halves of the memory alternately, because a warp that is ahead must not
      // write where others still read.
      sum_over_team<true>(means, shared + odd * 2 * kRows * kMaxWarps);
      odd = !odd;
#pragma unroll
      for (int m = 0; m < 2 * kRows; ++m) {
        means[m] = args.rms && m % 2 == 0 ? 0 : means[m] / size.channels;
      }
    }
    channels.each([&](int i, int c) {
      if constexpr (!kAhead) load_beside(i, c);
      totals.template add_gated<kGate, kNorm>(rows, beside[i], args, i, c, channels, slice.sample,
                                              row, slice.end, means);
    });
  }
  totals.template store<kGate, kNorm>(args, channels, slice.sample);
}

// Sums the partial sums (kSums, B * slices, D) to gradients (B, D) or, where all samples share the
// parameter, (1, D).
template <class C>
void sum_over_slices(const TokenSlices& size, Address partials, Parameter grad_y_bias,
                     const ModulationGradient (&grads)[3], DType dtype, Address stream) {
  const int64_t parts = int64_t(size.batch) * slices(size);
  auto total = [&](int sum, Address data, DType type, bool shared) -> PartialSums<C> {
    if (!data) return {};
    const C* first = partials.as<const C>() + sum * parts * size.channels;
    if (shared) return {first, data, type, 1, parts};
    return {first, data, type, size.batch, slices(size)};
  };
  auto modulation = [&](int sum) {
    const ModulationGradient& grad = grads[sum - kGateSum];
    return total(sum, grad.data, dtype, grad.shared);
  };
  sum_partials<C>(size.channels,
                  {total(kGradSum, grad_y_bias.data, grad_y_bias.dtype, true), modulation(kGateSum),
                   modulation(kShiftSum), modulation(kScaleSum)},
                  stream);
}

}  // namespace

void gate_residual_adaln_backward(AdalnTypes types, TokenSlices size, Address grad_h,
                                  Address grad_x_out, Address x, Address y, Parameter y_bias,
                                  Modulation gate, Modulation scale, Address mean, Address rstd,
                                  bool rms, Address grad_x, Address grad_y, Parameter grad_y_bias,
                                  ModulationGradient grad_gate, ModulationGradient grad_shift,
                                  ModulationGradient grad_scale, Address partials, Address stream) {
  const ModulationGradient grads[3] = {grad_gate, grad_shift, grad_scale};
  if (size.batch == 0 || size.tokens == 0 || size.channels == 0) return;
  with_adaln_types(types, [&](auto x_type, auto y_type, auto modulation_type) {
    using T = typename decltype(x_type)::type;
    using Y = typename decltype(y_type)::type;
    using M = typename decltype(modulation_type)::type;
    using C = Compute<T>;
    BackwardArguments<T, Y, M> arguments{
        grad_h.as<const T>(),
        grad_x_out.as<const T>(),
        x.as<const T>(),
        y.as<const Y>(),
        y_bias,
        gate,
        scale,
        mean.as<const C>(),
        rstd.as<const C>(),
        rms,
        grad_x.as<T>(),
        grad_y.as<Y>(),
        {nullptr, grads[0].data.as<M>(), grads[1].data.as<M>(), grads[2].data.as<M>()},
        partials.as<C>()};
    const bool aligned = is_aligned({grad_h, grad_x_out, x, y, y_bias.data, grad_x, grad_y,
                                     grads[0].data, grads[1].data, grads[2].data, partials}) &&
                         arguments.gate.is_aligned() && arguments.scale.is_aligned();
    auto run = [&](auto vector, auto deal, int threads) {
      constexpr int kVector = vector.value, kItems = deal.kItems;
      // Registers do not hold four sums of 16 channels beside two rows in float. So the sums behind
      // the gate get a pass of their own, in which grad_x, as exact as they are, is the gradient.
      constexpr bool kApart = kVector * kItems > 8 && sizeof(T) == 4;
      auto start = [&](auto gate, auto norm) {
        launch<
            gate_residual_adaln_backward_kernel<T, Y, M, kVector, kItems, gate.value, norm.value>>(
            dim3(size.batch, slices(size)), dim3(threads), 0, cuda_stream(stream), size, arguments);
      };
      constexpr std::true_type with;
      constexpr std::false_type without;
      if constexpr (kApart) {
        if (grad_h) start(without, with);
        if (grad_h) arguments.grad_x_out = arguments.grad_x;
        if (y) start(with, without);
      } else if (y) {
        grad_h ? start(with, with) : start(with, without);
      } else if constexpr (std::is_same_v<T, Y>) {
        start(without, with);
      }
    };
    // The second has 16 channels a thread.
    with_channels<T, Deal<1, true>, Deal<sizeof(T), true>>(size.channels, aligned, run);
    if (partials) {
      sum_over_slices<C>(size, partials, grad_y_bias, grads, types.modulation, stream);
    }
  });
}

}  // namespace msf
