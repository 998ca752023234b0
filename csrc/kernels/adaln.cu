// adaln_modulate, gate_residual and gate_residual_adaln, each in one pass over memory. The
// equations are in msf_kernels/adaln/reference.py.
//
// A row of up to 1536 channels in 16 bits belongs to one warp, which meets no barrier: each of the
// 16 or more warps of an SM has a row of x and y in flight, at 1152 channels 4.6 KB. Longer rows
// belong to a block.
#include "adaln.cuh"

namespace msf {
namespace {

constexpr int kTeams = 4;  // of a block, where a team is one warp

template <class T, class Y, class M>
struct ForwardArguments {
  const T* x;                            // (B, N, D)
  const Y* y;                            // (B, N, D)
  Parameter y_bias;                      // (D,) or absent
  ModulationRows<M> gate, shift, scale;  // (B, D)
  Compute<T> eps;
  bool eager;        // rounds where PyTorch would, operation by operation
  bool rms;          // subtracts no mean
  T* x_out;          // (B, N, D)
  T* h;              // (B, N, D)
  Compute<T>* mean;  // (B, N), absent like rstd where no gradient is to come
  Compute<T>* rstd;  // (B, N)
};

// Rounds a value as eager PyTorch does between two operators.
template <class T, bool kEager>
__device__ Compute<T> rounded(Compute<T> value) {
  return kEager ? to_compute(from_compute<T>(value)) : value;
}

// Returns a * b + c, with one rounding less than the reference where none is asked for in between.
template <class T, bool kEager>
__device__ Compute<T> multiply_add(Compute<T> a, Compute<T> b, Compute<T> c) {
  return kEager ? rounded<T, true>(a * b) + c : fused_multiply_add(a, b, c);
}

// Computes x += gate * (y + y_bias) for the tokens from `row` to `end`, and stores it to x_out.
template <bool kEager, class T, class Y, class M, int kVector, int kItems, bool kWhole, int kRows>
__device__ void add_gated(Packed<T, kVector> (&x)[kRows][kItems],
                          const Packed<Y, kVector> (&y)[kRows][kItems],
                          const ForwardArguments<T, Y, M>& args,
                          const Channels<kVector, kItems, kWhole>& channels, int sample,
                          int64_t row, int64_t end) {
  using C = Compute<T>;
  channels.each([&](int i, int c) {
    const auto gate = Packed<M, kVector>::load(args.gate[sample] + c);
    const auto bias = load_parameter<Y, kVector>(args.y_bias, c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r][i] = Packed<T, kVector>::of([&](int k) {
        const C branch = rounded<T, kEager>(y[r][i][k] + bias[k]);
        return multiply_add<T, kEager>(gate[k], branch, x[r][i][k]);
      });
      if (row + r < end) x[r][i].store(args.x_out + (row + r) * channels.count + c);
    }
  });
}

// Computes the mean and the reciprocal deviation of each row. It goes over the x in its registers
// twice: first for the mean, then for the squares around it. The mean of an RMS norm stays 0.
template <class T, class C, int kVector, int kItems, bool kWhole, int kRows>
__device__ void measure(const Packed<T, kVector> (&x)[kRows][kItems], C eps, bool rms,
                        const Channels<kVector, kItems, kWhole>& channels, C (&mean)[kRows],
                        C (&rstd)[kRows]) {
  MSF_SHARED(C, shared_sums, kRows * kMaxWarps);
  MSF_SHARED(C, shared_squares, kRows * kMaxWarps);
  auto each_element = [&](auto body) {
    channels.each([&](int i, int) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) body(r, x[r][i][k]);
      }
    });
  };
  if (!rms) {
    each_element([&](int r, C value) { mean[r] += value; });
    sum_over_team<kWhole>(mean, shared_sums);
#pragma unroll
    for (int r = 0; r < kRows; ++r) mean[r] /= channels.count;
  } else if constexpr (kWhole) {
    __syncthreads();  // as in the sum above: the squares of the rows before have been read by then
  }
  each_element([&](int r, C value) {
    rstd[r] = fused_multiply_add(value - mean[r], value - mean[r], rstd[r]);
  });
  sum_over_team<kWhole>(rstd, shared_squares);
#pragma unroll
  for (int r = 0; r < kRows; ++r) rstd[r] = reciprocal_root(rstd[r] / channels.count + eps);
}

// Computes h of the tokens from `row` to `end`.
template <bool kEager, class T, class Y, class M, int kVector, int kItems, bool kWhole, int kRows>
__device__ void modulate(const Packed<T, kVector> (&x)[kRows][kItems],
                         const Compute<T> (&mean)[kRows], const Compute<T> (&rstd)[kRows],
                         const ForwardArguments<T, Y, M>& args,
                         const Channels<kVector, kItems, kWhole>& channels, int sample, int64_t row,
                         int64_t end) {
  using C = Compute<T>;
  channels.each([&](int i, int c) {
    const auto shift = Packed<M, kVector>::load(args.shift[sample] + c);
    const auto scale = Packed<M, kVector>::load(args.scale[sample] + c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto h = Packed<T, kVector>::of([&](int k) {
        const C normalised = rounded<T, kEager>((x[r][i][k] - mean[r]) * rstd[r]);
        return multiply_add<T, kEager>(normalised, rounded<T, kEager>(1 + scale[k]), shift[k]);
      });
      if (row + r < end) h.store(args.h + (row + r) * channels.count + c);
    }
  });
}

template <bool kEager, bool kGate, bool kNorm, class T, class Y, class M, int kVector, int kItems,
          bool kWhole>
__device__ void walk(const Slice& slice, const ForwardArguments<T, Y, M>& args,
                     const Channels<kVector, kItems, kWhole>& channels) {
  using C = Compute<T>;
  // Two short rows, so that a warp has as much in flight as with a long one.
  constexpr int kRows = kVector > 1 && kItems == 2 ? 2 : 1;
  for (int64_t row = slice.first; row < slice.end; row += kRows) {
    Packed<T, kVector> x[kRows][kItems] = {};
    Packed<Y, kVector> y[kRows][kItems] = {};
    channels.load(x, args.x, row, slice.end);
    if constexpr (kGate) {
      channels.load(y, args.y, row, slice.end);
      add_gated<kEager>(x, y, args, channels, slice.sample, row, slice.end);
    }
    if constexpr (kNorm) {
      C mean[kRows] = {}, rstd[kRows] = {};
      measure(x, args.eps, args.rms, channels, mean, rstd);
      modulate<kEager>(x, mean, rstd, args, channels, slice.sample, row, slice.end);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!args.mean || threadIdx.x != 0 || row + r >= slice.end) continue;
        args.mean[row + r] = mean[r];
        args.rstd[row + r] = rstd[r];
      }
    }
  }
}

// Five blocks of one-warp teams an SM, 20 warps. y in float beside x in 16 bits takes the registers
// of one or two of them.
// registers: 128; 136 for <__*, float, float, 8, 6, *>
template <class T, class Y, class M, int kVector, int kItems, bool kWhole, bool kGate, bool kNorm>
__global__ void __launch_bounds__(kWhole ? kMaxThreads : kTeams * kWarp,
                                  kWhole || sizeof(Y) > sizeof(T) ? 1 : 5)
    gate_residual_adaln_kernel(TokenSlices size, ForwardArguments<T, Y, M> args) {
  const Slice slice(size);
  const Channels<kVector, kItems, kWhole> channels{size.channels};
  // Two loops: in one, what both roundings compute alike would wait in registers for the branch.
  if (args.eager) {
    walk<true, kGate, kNorm>(slice, args, channels);
  } else {
    walk<false, kGate, kNorm>(slice, args, channels);
  }
}

}  // namespace

void gate_residual_adaln(AdalnTypes types, TokenSlices size, Address x, Address y, Parameter y_bias,
                         Modulation gate, Modulation shift, Modulation scale, double eps,
                         bool eager, bool rms, Address x_out, Address h, Address mean, Address rstd,
                         Address stream) {
  if (size.batch == 0 || size.tokens == 0 || size.channels == 0) return;
  with_adaln_types(types, [&](auto x_type, auto y_type, auto modulation_type) {
    using T = typename decltype(x_type)::type;
    using Y = typename decltype(y_type)::type;
    using M = typename decltype(modulation_type)::type;
    const ForwardArguments<T, Y, M> arguments{x.as<const T>(),
                                              y.as<const Y>(),
                                              y_bias,
                                              gate,
                                              shift,
                                              scale,
                                              Compute<T>(eps),
                                              eager,
                                              rms,
                                              x_out.as<T>(),
                                              h.as<T>(),
                                              mean.as<Compute<T>>(),
                                              rstd.as<Compute<T>>()};
    const bool aligned = is_aligned({x, y, y_bias.data, x_out, h}) && arguments.gate.is_aligned() &&
                         arguments.shift.is_aligned() && arguments.scale.is_aligned();
    auto run = [&](auto vector, auto deal, int threads) {
      const int teams = deal.kWhole ? 1 : kTeams;
      const dim3 grid(size.batch, (slices(size) + teams - 1) / teams), block(threads, teams);
      constexpr int kVector = vector.value, kItems = deal.kItems;
      constexpr bool kWhole = deal.kWhole;
      auto start = [&](auto gate, auto norm) {
        launch<
            gate_residual_adaln_kernel<T, Y, M, kVector, kItems, kWhole, gate.value, norm.value>>(
            grid, block, 0, cuda_stream(stream), size, arguments);
      };
      if (y && h) {
        start(std::true_type{}, std::true_type{});
      } else if (y) {
        start(std::true_type{}, std::false_type{});
      } else if constexpr (std::is_same_v<T, Y>) {
        start(std::false_type{}, std::true_type{});
      }
    };
    with_channels<T, Deal<2, false>, Deal<4, false>, Deal<6, false>, Deal<4, true>>(size.channels,
                                                                                    aligned, run);
  });
}

}  // namespace msf
