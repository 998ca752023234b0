// How kernels see images: which pixels a thread owns, and how it reads and writes them.
#pragma once

#include "image.hpp"
#include "launch.cuh"

namespace msf {

// An image (B, C, H, W) of any strides.
template <class T>
struct Image {
  T* data;                              // (B, C, H, W)
  int64_t batch, channel, row, column;  // strides in elements

  Image(const ImageView& view)
      : data(view.data.as<T>()),
        batch(view.batch),
        channel(view.channel),
        row(view.row),
        column(view.column) {}

  __device__ T* at(int b, int c, int h) const { return data + b * batch + c * channel + h * row; }
};

// A thread owns kVector base pixels. In planar images (NCHW) they are neighbours along the width,
// in interleaved ones (channels last) the channels of one pixel. Layout<1, true> takes any strides.
template <int kVectorSize, bool kIsPlanar>
struct Layout {
  static constexpr int kVector = kVectorSize;
  static constexpr bool kPlanar = kIsPlanar;
};
using AnyLayout = Layout<1, true>;

// The indices of a base pixel, the first of those that a thread owns.
struct Pixel {
  int b, c, h, w;
};

// Calls body(pixel) with the first pixel of each vector of this thread. Blocks are (vectors of a
// plane, planes). A plane is one channel of a planar image, and all channels of an interleaved one.
template <class L, class Body>
__device__ void for_each_pixel(const Extent& base, Body body) {
  const unsigned per_pixel = L::kPlanar ? 1 : base.channels / L::kVector;
  const unsigned per_row = L::kPlanar ? base.width / L::kVector : base.width * per_pixel;
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= per_row * base.height) return;
  const int h = index / per_row, in_row = index % per_row;
  const int64_t planes = int64_t(base.batch) * (L::kPlanar ? base.channels : 1);
  for (int64_t plane = blockIdx.y * blockDim.y + threadIdx.y; plane < planes;
       plane += gridDim.y * blockDim.y) {
    if constexpr (L::kPlanar) {
      const unsigned in_batch = plane, channels = base.channels;  // launch_pixels: less than 2^31
      body(Pixel{int(in_batch / channels), int(in_batch % channels), h, in_row * L::kVector});
    } else {
      const int pixel = in_row / per_pixel, vector = in_row % per_pixel;
      body(Pixel{int(plane), vector * L::kVector, h, pixel});
    }
  }
}

// Starts a kernel that calls for_each_pixel on the base pixels of `base`.
template <class L, auto kKernel, class... Args>
void launch_pixels(const Extent& base, Address stream, Args... args) {
  const int64_t per_plane =
      int64_t(base.height) * base.width * (L::kPlanar ? 1 : base.channels) / L::kVector;
  const int64_t planes = int64_t(base.batch) * (L::kPlanar ? base.channels : 1);
  if (per_plane == 0 || planes == 0) return;
  if (per_plane > INT32_MAX || planes > INT32_MAX) {
    throw std::runtime_error("msf: images must have fewer than 2^31 planes and vectors in each");
  }
  unsigned x = 1;
  while (x < per_plane && x < kThreads) x *= 2;
  const unsigned y = kThreads / x;  // small planes share a block
  launch<kKernel>(dim3((per_plane + x - 1) / x, grid_rows((planes + y - 1) / y)), dim3(x, y), 0,
                  cuda_stream(stream), base, args...);
}

// The window of an image that a thread holds in registers. For each of its base pixels it has
// kScale x kScale pixels, 1x1 in a base image and 2x2 in an image twice as large, and around all of
// them a margin of kMargin pixels, which repeat the outermost ones at the edges of the image.
template <class T, class L, int kScale, int kMargin>
struct Window {
  static constexpr int kOwn = L::kPlanar ? kScale * L::kVector : kScale;
  static constexpr int kDepth = L::kPlanar ? 1 : L::kVector;
  Compute<T> pixels[kScale + 2 * kMargin][kOwn + 2 * kMargin][kDepth];

  // The pixel at (dy, dx) from the first one that belongs to the k-th base pixel.
  __device__ Compute<T>& operator()(int k, int dy, int dx) {
    return L::kPlanar ? pixels[kMargin + dy][kMargin + kScale * k + dx][0]
                      : pixels[kMargin + dy][kMargin + dx][k];
  }

  __device__ void load(const Image<const T>& image, const Pixel& at, const Extent& base) {
    const int height = kScale * base.height, width = kScale * base.width;
#pragma unroll
    for (int r = -kMargin; r < kScale + kMargin; ++r) {
      const int h = kScale * at.h + r;
      const T* line = image.at(at.b, at.c, kMargin ? clamped(h, height) : h);
      load_own(line, image.column, r, kScale * at.w);
      if constexpr (kMargin > 0) {
        load_margin(line, image.column, r, -1, clamped(kScale * at.w - 1, width));
        load_margin(line, image.column, r, kOwn, clamped(kScale * at.w + kOwn, width));
      }
    }
  }

  __device__ void store(const Image<T>& image, const Pixel& at) {
    static_assert(kMargin == 0, "a thread writes its own pixels");
    constexpr int kStep = L::kPlanar ? L::kVector : 1;
#pragma unroll
    for (int r = 0; r < kScale; ++r) {
      T* line = image.at(at.b, at.c, kScale * at.h + r);
#pragma unroll
      for (int j = 0; j < kScale; ++j) {
        Vector<T, L::kVector> chunk;
#pragma unroll
        for (int k = 0; k < L::kVector; ++k) {
          chunk[k] = from_compute<T>(L::kPlanar ? pixels[r][j * kStep + k][0] : pixels[r][j][k]);
        }
        chunk.store(line + (kScale * at.w + j * kStep) * image.column);
      }
    }
  }

 private:
  __device__ static int clamped(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }

  __device__ void load_own(const T* line, int64_t column_stride, int r, int first) {
    constexpr int kStep = L::kPlanar ? L::kVector : 1;
#pragma unroll
    for (int j = 0; j < kScale; ++j) {
      const auto chunk = Vector<T, L::kVector>::load(line + (first + j * kStep) * column_stride);
#pragma unroll
      for (int k = 0; k < L::kVector; ++k) {
        const int column = kMargin + (L::kPlanar ? j * kStep + k : j);
        pixels[kMargin + r][column][L::kPlanar ? 0 : k] = to_compute(chunk[k]);
      }
    }
  }

  __device__ void load_margin(const T* line, int64_t column_stride, int r, int column, int source) {
    const auto edge = Vector<T, kDepth>::load(line + source * column_stride);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      pixels[kMargin + r][kMargin + column][k] = to_compute(edge[k]);
    }
  }
};

// The mean and deviation of each channel of a thread's pixels.
template <class T, class L>
struct ChannelStatistics {
  static constexpr int kDepth = L::kPlanar ? 1 : L::kVector;
  Compute<T> mean[kDepth], std[kDepth];
  bool shifted, scaled;  // false: skip it, since adding 0 loses the sign of -0, dividing by 1 time

  __device__ ChannelStatistics(const Statistics& view, int channel)
      : shifted(bool(view.mean)), scaled(bool(view.std)) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      mean[k] = view.mean ? view.mean.as<const Compute<T>>()[channel + k] : 0;
      std[k] = view.std ? view.std.as<const Compute<T>>()[channel + k] : 1;
    }
  }
  __device__ Compute<T> standardise(Compute<T> value, int k) const {
    return divide(shifted ? value - mean[L::kPlanar ? 0 : k] : value, k);
  }
  // The gradient of standardise; the mean has no part in it.
  __device__ Compute<T> divide(Compute<T> value, int k) const {
    return scaled ? value / std[L::kPlanar ? 0 : k] : value;
  }
  __device__ Compute<T> multiply(Compute<T> value, int k) const {
    return scaled ? value * std[L::kPlanar ? 0 : k] : value;
  }
  __device__ Compute<T> restore(Compute<T> value, int k) const {
    value = multiply(value, k);
    return shifted ? value + mean[L::kPlanar ? 0 : k] : value;
  }
};

// Calls body(layout) with a layout in which every image can be read in vectors of kVector elements,
// of 16 bytes at most, or with AnyLayout.
template <int kVector, class Body>
void with_layout(const Extent& base, std::initializer_list<ImageView> images, Body body) {
  bool planar = base.width % kVector == 0, interleaved = base.channels % kVector == 0;
  for (const ImageView& image : images) {
    if (!image.data) continue;
    const bool aligned =
        is_aligned({image.data}) && image.batch % kVector == 0 && image.row % kVector == 0;
    planar &= aligned && image.column == 1 && image.channel % kVector == 0;
    interleaved &= aligned && image.channel == 1 && image.column % kVector == 0;
  }
  if (planar) {
    body(Layout<kVector, true>{});
  } else if (interleaved) {
    body(Layout<kVector, false>{});
  } else {
    body(AnyLayout{});
  }
}

template <class T, class Body>
void with_layout(const Extent& base, std::initializer_list<ImageView> images, Body body) {
  with_layout<16 / sizeof(T)>(base, images, body);
}

}  // namespace msf
