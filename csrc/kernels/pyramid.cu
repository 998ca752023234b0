// pyramid_split, pyramid_merge and their gradients, each in one pass over memory. The equations are
// in msf_kernels/pyramid/reference.py.
//
// Bilinear kernels (kMargin 1) have larger budgets, because they hold the neighbours of a pixel
// too, and in interleaved images those of all channels of a vector.
#include "dispatch.cuh"
#include "pyramid.hpp"
#include "resample.cuh"

namespace msf {
namespace {

// Fills the window of base pixels of x around `at`, rounded as the base that is written. Neighbours
// are pooled again rather than exchanged: their pixels are in L1, and no thread waits for another.
template <class T, class L, int kMargin>
__device__ void pool_around(Window<T, L, 1, kMargin>& base, Window<T, L, 2, 0>& own,
                            const Image<const T>& x, const Pixel& at, const Extent& extent) {
  auto rounded = [](Compute<T> value) { return to_compute(from_compute<T>(value)); };
#pragma unroll
  for (int k = 0; k < L::kVector; ++k) base(k, 0, 0) = rounded(pool(own, k));
  if constexpr (kMargin > 0) {
    using Edge = std::conditional_t<L::kPlanar, AnyLayout, L>;
    constexpr int kOwn = Window<T, L, 1, 1>::kOwn;
#pragma unroll
    for (int r = -1; r <= 1; ++r) {
      const int h = at.h + r < 0 ? 0 : at.h + r < extent.height ? at.h + r : extent.height - 1;
      if (r != 0) {
        Window<T, L, 2, 0> row;
        row.load(x, {at.b, at.c, h, at.w}, extent);
#pragma unroll
        for (int k = 0; k < L::kVector; ++k) base(k, r, 0) = rounded(pool(row, k));
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int column = side ? kOwn : -1, w = at.w + column;
        Window<T, Edge, 2, 0> edge;
        edge.load(x, {at.b, at.c, h, w < 0 ? 0 : w < extent.width ? w : extent.width - 1}, extent);
#pragma unroll
        for (int k = 0; k < Edge::kVector; ++k) {
          base.pixels[1 + r][1 + column][k] = rounded(pool(edge, k));
        }
      }
    }
  }
}

// registers: 96; 128 for <*, 1>; 224 for <*false>, 1>
template <class T, class L, int kMargin>
__global__ void pyramid_split_kernel(Extent extent,
                                     Image<const T> x,   // (B, C, 2h, 2w)
                                     Image<T> base,      // (B, C, h, w)
                                     Image<T> residual,  // (B, C, 2h, 2w)
                                     Statistics view) {
  for_each_pixel<L>(extent, [&](const Pixel& at) {
    const ChannelStatistics<T, L> statistics(view, at.c);
    Window<T, L, 2, 0> pixels;
    pixels.load(x, at, extent);
    Window<T, L, 1, kMargin> base_window;
    pool_around(base_window, pixels, x, at, extent);
    Window<T, L, 1, 0> own;
#pragma unroll
    for (int k = 0; k < L::kVector; ++k) {
      own(k, 0, 0) = base_window(k, 0, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Compute<T> detail = pixels(k, i / 2, i % 2) - upsample(base_window, k, i / 2, i % 2);
        pixels(k, i / 2, i % 2) = statistics.standardise(detail, k);
      }
    }
    own.store(base, at);
    pixels.store(residual, at);
  });
}

// registers: 96; 128 for <*, 1>; 224 for <*false>, 1>
template <class T, class L, int kMargin>
__global__ void pyramid_split_backward_kernel(
    Extent extent,
    Image<const T> grad_base,      // (B, C, h, w) or absent
    Image<const T> grad_residual,  // (B, C, 2h, 2w) or absent
    Image<T> grad_x,               // (B, C, 2h, 2w)
    Statistics view) {
  for_each_pixel<L>(extent, [&](const Pixel& at) {
    const ChannelStatistics<T, L> statistics(view, at.c);
    Window<T, L, 2, kMargin> grad;
    if (grad_residual.data) {
      grad.load(grad_residual, at, extent);
    } else {
      grad = {};
    }
    Window<T, L, 1, 0> from_base;
    if (grad_base.data) {
      from_base.load(grad_base, at, extent);
    } else {
      from_base = {};
    }
    constexpr int kSide = 2 + 2 * kMargin, kDepth = ChannelStatistics<T, L>::kDepth;
    constexpr int kColumns = Window<T, L, 2, kMargin>::kOwn + 2 * kMargin;
#pragma unroll
    for (int i = 0; i < kSide * kColumns * kDepth; ++i) {
      Compute<T>& value = grad.pixels[i / kDepth / kColumns][i / kDepth % kColumns][i % kDepth];
      value = statistics.divide(value, i % kDepth);
    }
    Window<T, L, 2, 0> out;
#pragma unroll
    for (int k = 0; k < L::kVector; ++k) {
      const Compute<T> pooled = -upsample_adjoint(grad, k) + from_base(k, 0, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) out(k, i / 2, i % 2) = grad(k, i / 2, i % 2) + pooled / 4;
    }
    out.store(grad_x, at);
  });
}

// registers: 96; 128 for <*, 1>; 224 for <*false>, 1>
template <class T, class L, int kMargin>
__global__ void pyramid_merge_kernel(Extent extent,
                                     Image<const T> base,      // (B, C, h, w)
                                     Image<const T> residual,  // (B, C, 2h, 2w)
                                     Image<T> x,               // (B, C, 2h, 2w)
                                     Statistics view, Compute<T> low, Compute<T> high) {
  for_each_pixel<L>(extent, [&](const Pixel& at) {
    const ChannelStatistics<T, L> statistics(view, at.c);
    Window<T, L, 1, kMargin> base_window;
    base_window.load(base, at, extent);
    Window<T, L, 2, 0> pixels;
    pixels.load(residual, at, extent);
#pragma unroll
    for (int k = 0; k < L::kVector; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Compute<T> detail = statistics.restore(pixels(k, i / 2, i % 2), k);
        pixels(k, i / 2, i % 2) =
            clamped(upsample(base_window, k, i / 2, i % 2) + detail, low, high);
      }
    }
    pixels.store(x, at);
  });
}

// registers: 96; 128 for <*, 1>; 224 for <*false>, 1>
template <class T, class L, int kMargin>
__global__ void pyramid_merge_backward_kernel(Extent extent,
                                              Image<const T> grad_x,   // (B, C, 2h, 2w)
                                              Image<T> grad_base,      // (B, C, h, w)
                                              Image<T> grad_residual,  // (B, C, 2h, 2w)
                                              Statistics view) {
  for_each_pixel<L>(extent, [&](const Pixel& at) {
    const ChannelStatistics<T, L> statistics(view, at.c);
    Window<T, L, 2, kMargin> grad;
    grad.load(grad_x, at, extent);
    Window<T, L, 1, 0> to_base;
    Window<T, L, 2, 0> to_residual;
#pragma unroll
    for (int k = 0; k < L::kVector; ++k) {
      to_base(k, 0, 0) = upsample_adjoint(grad, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to_residual(k, i / 2, i % 2) = statistics.multiply(grad(k, i / 2, i % 2), k);
      }
    }
    to_base.store(grad_base, at);
    to_residual.store(grad_residual, at);
  });
}

// Calls body(type, layout, margin). The margin is 1 for bilinear upsampling, which reads the pixels
// around a thread's own, else 0.
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
        launch_pixels<L, pyramid_split_kernel<T, L, margin.value>>(
            extent, stream, Image<const T>(x), Image<T>(base), Image<T>(residual), statistics);
      });
}

void pyramid_split_backward(DType dtype, Extent extent, ImageView grad_base,
                            ImageView grad_residual, ImageView grad_x, Statistics statistics,
                            bool bilinear, Address stream) {
  with_pyramid(dtype, extent, {grad_base, grad_residual, grad_x}, bilinear,
               [&](auto type, auto layout, auto margin) {
                 using T = typename decltype(type)::type;
                 using L = decltype(layout);
                 launch_pixels<L, pyramid_split_backward_kernel<T, L, margin.value>>(
                     extent, stream, Image<const T>(grad_base), Image<const T>(grad_residual),
                     Image<T>(grad_x), statistics);
               });
}

void pyramid_merge(DType dtype, Extent extent, ImageView base, ImageView residual, ImageView x,
                   Statistics statistics, bool bilinear, Clamp clamp, Address stream) {
  with_pyramid(dtype, extent, {base, residual, x}, bilinear,
               [&](auto type, auto layout, auto margin) {
                 using T = typename decltype(type)::type;
                 using L = decltype(layout);
                 launch_pixels<L, pyramid_merge_kernel<T, L, margin.value>>(
                     extent, stream, Image<const T>(base), Image<const T>(residual), Image<T>(x),
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
                 launch_pixels<L, pyramid_merge_backward_kernel<T, L, margin.value>>(
                     extent, stream, Image<const T>(grad), Image<T>(grad_base),
                     Image<T>(grad_residual), statistics);
               });
}

}  // namespace msf
