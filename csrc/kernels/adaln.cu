// adaln_modulate, gate_residual and gate_residual_adaln, each in one pass over memory. The
// equations are in msf_kernels/adaln/reference.py.
#include "adaln.cuh"

namespace msf {
namespace {

template <class T, class Y, class M>
struct ForwardArguments {
  const T* x;                            // (B, N, D)
  const Y* y;                            // (B, N, D)
  ModulationRows<M> gate, shift, scale;  // (B, D)
  Compute<T> eps;
  bool eager;        // rounds where PyTorch would, operation by operation
  T* x_out;          // (B, N, D)
  T* h;              // (B, N, D)
  Compute<T>* mean;  // (B, N)
  Compute<T>* rstd;  // (B, N)
};

// Rounds a value as eager PyTorch does between two operators.
template <class T>
__device__ Compute<T> rounded(Compute<T> value, bool eager) {
  return eager ? to_compute(from_compute<T>(value)) : value;
}

// Computes x[r][i] += gate * y for the tokens from `row` to `end`, and stores it to x_out.
template <class T, class Y, class M, int kVector, int kItems, int kRows>
__device__ void add_gated(Vector<T, kVector> (&x)[kRows][kItems],
                          const ForwardArguments<T, Y, M>& args,
                          const Channels<kVector, kItems>& channels, int sample, int64_t row,
                          int64_t end) {
  Vector<Y, kVector> y[kRows][kItems];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (row + r >= end) break;
    const Y* token = args.y + (row + r) * channels.count;
    channels.each([&](int i, int c) { y[r][i] = y[r][i].load(token + c); });
  }
  channels.each([&](int i, int c) {
    const auto gate = Vector<M, kVector>::load(args.gate[sample] + c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= end) break;
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const Compute<T> branch =
            rounded<T>(to_compute(gate[k]) * to_compute(y[r][i][k]), args.eager);
        x[r][i][k] = from_compute<T>(to_compute(x[r][i][k]) + branch);
      }
      x[r][i].store(args.x_out + (row + r) * channels.count + c);
    }
  });
}

// Computes h of the tokens from `row` to `end`. It goes over the x in its registers twice: first
// for the mean, then for the squares around it.
template <class T, class Y, class M, int kVector, int kItems, int kRows>
__device__ void normalise(const Vector<T, kVector> (&x)[kRows][kItems],
                          const ForwardArguments<T, Y, M>& args,
                          const Channels<kVector, kItems>& channels, int sample, int64_t row,
                          int64_t end) {
  using C = Compute<T>;
  MSF_SHARED(C, shared_sums, kRows * kMaxWarps);
  MSF_SHARED(C, shared_squares, kRows * kMaxWarps);
  auto each_element = [&](auto body) {
    channels.each([&](int i, int) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) body(r, to_compute(x[r][i][k]));
      }
    });
  };
  C mean[kRows] = {}, rstd[kRows] = {};
  each_element([&](int r, C value) { mean[r] += value; });
  sum_over_block(mean, shared_sums);
#pragma unroll
  for (int r = 0; r < kRows; ++r) mean[r] /= channels.count;
  each_element([&](int r, C value) { rstd[r] += (value - mean[r]) * (value - mean[r]); });
  sum_over_block(rstd, shared_squares);
#pragma unroll
  for (int r = 0; r < kRows; ++r) rstd[r] = reciprocal_root(rstd[r] / channels.count + args.eps);

  channels.each([&](int i, int c) {
    const auto shift = Vector<M, kVector>::load(args.shift[sample] + c);
    const auto scale = Vector<M, kVector>::load(args.scale[sample] + c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= end) break;
      Vector<T, kVector> h;
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const C normalised = rounded<T>((to_compute(x[r][i][k]) - mean[r]) * rstd[r], args.eager);
        const C factor = rounded<T>(1 + to_compute(scale[k]), args.eager);
        const C scaled = rounded<T>(normalised * factor, args.eager);
        h[k] = from_compute<T>(scaled + to_compute(shift[k]));
      }
      h.store(args.h + (row + r) * channels.count + c);
    }
  });
  if (threadIdx.x == 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= end) break;
      args.mean[row + r] = mean[r];
      args.rstd[row + r] = rstd[r];
    }
  }
}

// Blocks are (samples, slices).
// registers: 128
template <class T, class Y, class M, int kVector, int kItems, bool kGate, bool kNorm>
__global__ void __launch_bounds__(kMaxThreads, 1)
    gate_residual_adaln_kernel(TokenSlices size, ForwardArguments<T, Y, M> args) {
  constexpr int kRows = rows_at_once<T, kVector, kItems>(16);
  const Slice slice(size);
  const Channels<kVector, kItems> channels{size.channels};
  for (int64_t row = slice.first; row < slice.end; row += kRows) {
    Vector<T, kVector> x[kRows][kItems] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= slice.end) break;
      const T* token = args.x + (row + r) * size.channels;
      channels.each([&](int i, int c) { x[r][i] = x[r][i].load(token + c); });
    }
    if constexpr (kGate) add_gated(x, args, channels, slice.sample, row, slice.end);
    if constexpr (kNorm) normalise(x, args, channels, slice.sample, row, slice.end);
  }
}

}  // namespace

void gate_residual_adaln(AdalnTypes types, TokenSlices size, Address x, Address y, Modulation gate,
                         Modulation shift, Modulation scale, double eps, bool eager, Address x_out,
                         Address h, Address mean, Address rstd, Address stream) {
  if (size.batch == 0 || size.tokens == 0 || size.channels == 0) return;
  with_adaln_types(types, [&](auto x_type, auto y_type, auto modulation_type) {
    using T = typename decltype(x_type)::type;
    using Y = typename decltype(y_type)::type;
    using M = typename decltype(modulation_type)::type;
    const ForwardArguments<T, Y, M> arguments{
        x.as<const T>(),      y.as<const Y>(), gate,          shift,     scale,
        Compute<T>(eps),      eager,           x_out.as<T>(), h.as<T>(), mean.as<Compute<T>>(),
        rstd.as<Compute<T>>()};
    const bool aligned = is_aligned({x, y, x_out, h}) && arguments.gate.is_aligned() &&
                         arguments.shift.is_aligned() && arguments.scale.is_aligned();
    with_channels<T>(size.channels, aligned, [&](auto vector, auto items, int threads) {
      const dim3 grid(size.batch, slices(size));
      constexpr int kVector = vector.value, kItems = items.value;
      auto start = [&](auto gate, auto norm) {
        launch<gate_residual_adaln_kernel<T, Y, M, kVector, kItems, gate.value, norm.value>>(
            grid, dim3(threads), 0, cuda_stream(stream), size, arguments);
      };
      if (y && h) {
        start(std::true_type{}, std::true_type{});
      } else if (y) {
        start(std::true_type{}, std::false_type{});
      } else if constexpr (std::is_same_v<T, Y>) {
        start(std::false_type{}, std::true_type{});
      }
    });
  });
}

}  // namespace msf
