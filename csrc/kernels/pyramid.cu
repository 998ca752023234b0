// pyramid_split, pyramid_merge and their gradients, each in one pass over memory. The equations are
// in msf_kernels/pyramid/reference.py.
#include "dispatch.cuh"
#include "resample.cuh"

namespace msf {
namespace {

// Base pixels of x around a place, rounded as the base that is written. Neighbours are pooled
// again rather than exchanged: their pixels are in L1, and no thread waits for another.
template <class T, class L, int kMargin>
__device__ void pool_around(Patch<T, L, 1, kMargin>& base, Patch<T, L, 2, 0>& own,
                            const Image<const T>& x, const Place& p, const Extent& extent) {
  auto rounded = [](Compute<T> value) { return to_compute(from_compute<T>(value)); };
#pragma unroll
  for (int k = 0; k < L::kVector; ++k) base(k, 0, 0) = rounded(pool(own, k));
  if constexpr (kMargin > 0) {
    using Edge = std::conditional_t<L::kPlanar, AnyLayout, L>;
    constexpr int kOwn = Patch<T, L, 1, 1>::kOwn;
#pragma unroll
    for (int r = -1; r <= 1; ++r) {
      const int h = p.h + r < 0 ? 0 : p.h + r < extent.height ? p.h + r : extent.height - 1;
      if (r != 0) {
        Patch<T, L, 2, 0> row;
        row.load(x, {p.b, p.c, h, p.w}, extent);
#pragma unroll
        for (int k = 0; k < L::kVector; ++k) base(k, r, 0) = rounded(pool(row, k));
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int column = side ? kOwn : -1, w = p.w + column;
        Patch<T, Edge, 2, 0> edge;
        edge.load(x, {p.b, p.c, h, w < 0 ? 0 : w < extent.width ? w : extent.width - 1}, extent);
#pragma unroll
        for (int k = 0; k < Edge::kVector; ++k) {
          base.pixels[1 + r][1 + column][k] = rounded(pool(edge, k));
        }
      }
    }
  }
}

template <class T, class L, int kMargin>
__global__ void pyramid_split_kernel(Extent extent, Image<const T> x, Image<T> base,
                                     Image<T> residual, Statistics view) {
  for_each_place<L>(extent, [&](const Place& p) {
    const ChannelStatistics<T, L> statistics(view, p.c);
    Patch<T, L, 2, 0> pixels;
    pixels.load(x, p, extent);
    Patch<T, L, 1, kMargin> below;
    pool_around(below, pixels, x, p, extent);
    Patch<T, L, 1, 0> own;
#pragma unroll
    for (int k = 0; k < L::kVector; ++k) {
      own(k, 0, 0) = below(k, 0, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Compute<T> detail = pixels(k, i / 2, i % 2) - upsample(below, k, i / 2, i % 2);
        pixels(k, i / 2, i % 2) = statistics.standardise(detail, k);
      }
    }
    own.store(base, p);
    pixels.store(residual, p);
  });
}

template <class T, class L, int kMargin>
__global__ void pyramid_split_backward_kernel(Extent extent, Image<const T> grad_base,
                                              Image<const T> grad_residual, Image<T> grad_x,
                                              Statistics view) {
  for_each_place<L>(extent, [&](const Place& p) {
    const ChannelStatistics<T, L> statistics(view, p.c);
    Patch<T, L, 2, kMargin> grad;
    if (grad_residual.data) {
      grad.load(grad_residual, p, extent);
    } else {
      grad = {};
    }
    Patch<T, L, 1, 0> from_base;
    if (grad_base.data) {
      from_base.load(grad_base, p, extent);
    } else {
      from_base = {};
    }
    constexpr int kSide = 2 + 2 * kMargin, kDepth = ChannelStatistics<T, L>::kDepth;
    constexpr int kColumns = Patch<T, L, 2, kMargin>::kOwn + 2 * kMargin;
#pragma unroll
    for (int i = 0; i < kSide * kColumns * kDepth; ++i) {
      Compute<T>& value = grad.pixels[i / kDepth / kColumns][i / kDepth % kColumns][i % kDepth];
      value = statistics.divide(value, i % kDepth);
    }
    Patch<T, L, 2, 0> out;
#pragma unroll
    for (int k = 0; k < L::kVector; ++k) {
      const Compute<T> pooled = -upsample_adjoint(grad, k) + from_base(k, 0, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) out(k, i / 2, i % 2) = grad(k, i / 2, i % 2) + pooled / 4;
    }
    out.store(grad_x, p);
  });
}

template <class T, class L, int kMargin>
__global__ void pyramid_merge_kernel(Extent extent, Image<const T> base, Image<const T> residual,
                                     Image<T> x, Statistics view, Compute<T> low, Compute<T> high) {
  for_each_place<L>(extent, [&](const Place& p) {
    const ChannelStatistics<T, L> statistics(view, p.c);
    Patch<T, L, 1, kMargin> below;
    below.load(base, p, extent);
    Patch<T, L, 2, 0> pixels;
    pixels.load(residual, p, extent);
#pragma unroll
    for (int k = 0; k < L::kVector; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Compute<T> detail = statistics.restore(pixels(k, i / 2, i % 2), k);
        pixels(k, i / 2, i % 2) = clamped(upsample(below, k, i / 2, i % 2) + detail, low, high);
      }
    }
    pixels.store(x, p);
  });
}

template <class T, class L, int kMargin>
__global__ void pyramid_merge_backward_kernel(Extent extent, Image<const T> grad_x,
                                              Image<T> grad_base, Image<T> grad_residual,
                                              Statistics view) {
  for_each_place<L>(extent, [&](const Place& p) {
    const ChannelStatistics<T, L> statistics(view, p.c);
    Patch<T, L, 2, kMargin> grad;
    grad.load(grad_x, p, extent);
    Patch<T, L, 1, 0> to_base;
    Patch<T, L, 2, 0> to_residual;
#pragma unroll
    for (int k = 0; k < L::kVector; ++k) {
      to_base(k, 0, 0) = upsample_adjoint(grad, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to_residual(k, i / 2, i % 2) = statistics.multiply(grad(k, i / 2, i % 2), k);
      }
    }
    to_base.store(grad_base, p);
    to_residual.store(grad_residual, p);
  });
}

// Calls body(type, layout, margin): bilinear upsampling needs the pixels around a thread's own.
template <class Body>
void with_pyramid(DType dtype, const Extent& extent, std::initializer_list<ImageView> images,
                  bool bilinear, Body body) {
  with_type(dtype, [&](auto type) {
    with_layout<typename decltype(type)::type>(extent, images, [&](auto layout) {
      with_flag(bilinear, [&](auto flag) {
        body(type, layout, std::integral_constant<int, decltype(flag)::value>{});
      });
    });
  });
}

}  // namespace

void pyramid_split(DType dtype, Extent extent, ImageView x, ImageView base, ImageView residual,
                   Statistics statistics, bool bilinear, Address stream) {
  with_pyramid(
      dtype, extent, {x, base, residual}, bilinear, [&](auto type, auto layout, auto margin) {
        using T = typename decltype(type)::type;
        using L = decltype(layout);
        launch_places<L>(pyramid_split_kernel<T, L, margin.value>, extent, stream,
                         Image<const T>(x), Image<T>(base), Image<T>(residual), statistics);
      });
}

void pyramid_split_backward(DType dtype, Extent extent, ImageView grad_base,
                            ImageView grad_residual, ImageView grad_x, Statistics statistics,
                            bool bilinear, Address stream) {
  with_pyramid(dtype, extent, {grad_base, grad_residual, grad_x}, bilinear,
               [&](auto type, auto layout, auto margin) {
                 using T = typename decltype(type)::type;
                 using L = decltype(layout);
                 launch_places<L>(pyramid_split_backward_kernel<T, L, margin.value>, extent, stream,
                                  Image<const T>(grad_base), Image<const T>(grad_residual),
                                  Image<T>(grad_x), statistics);
               });
}

void pyramid_merge(DType dtype, Extent extent, ImageView base, ImageView residual, ImageView x,
                   Statistics statistics, bool bilinear, Clamp clamp, Address stream) {
  with_pyramid(dtype, extent, {base, residual, x}, bilinear,
               [&](auto type, auto layout, auto margin) {
                 using T = typename decltype(type)::type;
                 using L = decltype(layout);
                 launch_places<L>(pyramid_merge_kernel<T, L, margin.value>, extent, stream,
                                  Image<const T>(base), Image<const T>(residual), Image<T>(x),
                                  statistics, Compute<T>(clamp.low), Compute<T>(clamp.high));
               });
}

void pyramid_merge_backward(DType dtype, Extent extent, ImageView grad, ImageView grad_base,
                            ImageView grad_residual, Statistics statistics, bool bilinear,
                            Address stream) {
  with_pyramid(dtype, extent, {grad, grad_base, grad_residual}, bilinear,
               [&](auto type, auto layout, auto margin) {
                 using T = typename decltype(type)::type;
                 using L = decltype(layout);
                 launch_places<L>(pyramid_merge_backward_kernel<T, L, margin.value>, extent, stream,
                                  Image<const T>(grad), Image<T>(grad_base),
                                  Image<T>(grad_residual), statistics);
               });
}

}  // namespace msf
