// Images in kernels: which pixels a thread owns, and how it reads and writes them.
#pragma once

#include "dispatch.cuh"

namespace msf {

template <class T>
struct Image {
  T* data;
  int64_t batch, channel, row, column;  // strides in elements

  Image(const ImageView& view)
      : data(view.data.as<T>()),
        batch(view.batch),
        channel(view.channel),
        row(view.row),
        column(view.column) {}

  __device__ T* at(int b, int c, int h) const { return data + b * batch + c * channel + h * row; }
};

// A thread owns kVector base pixels: neighbours along the width in planar images (NCHW), channels
// of one pixel in interleaved ones (channels last). Layout<1, true> takes any strides.
template <int kVectorSize, bool kIsPlanar>
struct Layout {
  static constexpr int kVector = kVectorSize;
  static constexpr bool kPlanar = kIsPlanar;
};
using AnyLayout = Layout<1, true>;

// The first of a thread's base pixels.
struct Place {
  int b, c, h, w;
};

// Calls body(place) for every place of this thread. Blocks are (places of a plane, planes), where
// a plane is a channel of planar images and the whole of interleaved ones.
template <class L, class Body>
__device__ void for_each_place(const Extent& base, Body body) {
  const unsigned per_pixel = L::kPlanar ? 1 : base.channels / L::kVector;
  const unsigned per_row = L::kPlanar ? base.width / L::kVector : base.width * per_pixel;
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= per_row * base.height) return;
  const int h = index / per_row, in_row = index % per_row;
  const int64_t planes = int64_t(base.batch) * (L::kPlanar ? base.channels : 1);
  for (int64_t plane = blockIdx.y * blockDim.y + threadIdx.y; plane < planes;
       plane += gridDim.y * blockDim.y) {
    if constexpr (L::kPlanar) {
      const unsigned p = plane, channels = base.channels;  // launch_places: less than 2^31
      body(Place{int(p / channels), int(p % channels), h, in_row * L::kVector});
    } else {
      const int pixel = in_row / per_pixel, vector = in_row % per_pixel;
      body(Place{int(plane), vector * L::kVector, h, pixel});
    }
  }
}

template <class L, class Kernel, class... Args>
void launch_places(Kernel kernel, const Extent& base, Address stream, Args... args) {
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
  launch(kernel, dim3((per_plane + x - 1) / x, grid_rows((planes + y - 1) / y)), dim3(x, y), 0,
         cuda_stream(stream), base, args...);
}

// What a thread holds of an image: its kScale x kScale pixels (1: of a base, 2: of what lies above
// it) for each of its base pixels, and kMargin more around them, repeated at the image's edges.
template <class T, class L, int kScale, int kMargin>
struct Patch {
  static constexpr int kOwn = L::kPlanar ? kScale * L::kVector : kScale;
  static constexpr int kDepth = L::kPlanar ? 1 : L::kVector;
  Compute<T> pixels[kScale + 2 * kMargin][kOwn + 2 * kMargin][kDepth];

  // The pixel at (dy, dx) from the first one that belongs to the k-th base pixel.
  __device__ Compute<T>& operator()(int k, int dy, int dx) {
    return L::kPlanar ? pixels[kMargin + dy][kMargin + kScale * k + dx][0]
                      : pixels[kMargin + dy][kMargin + dx][k];
  }

  __device__ void load(const Image<const T>& image, const Place& p, const Extent& base) {
    const int height = kScale * base.height, width = kScale * base.width;
#pragma unroll
    for (int r = -kMargin; r < kScale + kMargin; ++r) {
      const int h = kScale * p.h + r;
      const T* line = image.at(p.b, p.c, kMargin ? clamped(h, height) : h);
      load_own(line, image.column, r, kScale * p.w);
      if constexpr (kMargin > 0) {
        load_margin(line, image.column, r, -1, clamped(kScale * p.w - 1, width));
        load_margin(line, image.column, r, kOwn, clamped(kScale * p.w + kOwn, width));
      }
    }
  }

  __device__ void store(const Image<T>& image, const Place& p) {
    static_assert(kMargin == 0, "a thread writes its own pixels");
    constexpr int kStep = L::kPlanar ? L::kVector : 1;
#pragma unroll
    for (int r = 0; r < kScale; ++r) {
      T* line = image.at(p.b, p.c, kScale * p.h + r);
#pragma unroll
      for (int j = 0; j < kScale; ++j) {
        Vector<T, L::kVector> chunk;
#pragma unroll
        for (int k = 0; k < L::kVector; ++k) {
          chunk[k] = from_compute<T>(L::kPlanar ? pixels[r][j * kStep + k][0] : pixels[r][j][k]);
        }
        chunk.store(line + (kScale * p.w + j * kStep) * image.column);
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

// Per-channel mean and deviation of a thread's pixels.
template <class T, class L>
struct ChannelStatistics {
  static constexpr int kDepth = L::kPlanar ? 1 : L::kVector;
  Compute<T> mean[kDepth], std[kDepth];
  bool shifted, scaled;  // adding 0 would lose a sign, dividing by 1 time

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
  // A gradient's share of the two: it knows no mean.
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

// Calls body(layout) with the widest layout in which every image can be read in 16-byte vectors.
template <class T, class Body>
void with_layout(const Extent& base, std::initializer_list<ImageView> images, Body body) {
  constexpr int kVector = 16 / sizeof(T);
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

}  // namespace msf
