// guided_euler_step and guided_euler_merge. The equations are in msf_kernels/euler/reference.py.
// Operations follow its order, so results agree bit for bit.
#include "dispatch.cuh"
#include "launch.cuh"
#include "packed.cuh"
#include "resample.cuh"

namespace msf {
namespace {

// The guided Euler step of one number: x + dt v, where guidance sets
// v = v_uncond + guidance_scale (v_cond - v_uncond). T is the type of the state.
template <class T>
struct GuidedEuler {
  using C = Compute<T>;
  C scale, dt;
  bool guided;

  __device__ explicit GuidedEuler(const EulerStep& step)
      : scale(read(step.guidance_scale, step.index)),
        dt(read(step.dt, step.index)),
        guided(bool(step.uncond.data)) {}

  __device__ C next(C x, C cond, C uncond) const {
    return x + dt * (guided ? uncond + scale * (cond - uncond) : cond);
  }

 private:
  __device__ static C read(const Scalar& scalar, const Address& index) {
    if (!scalar.table) return C(scalar.value);
    return scalar.table.as<const C>()[index ? *index.as<const int64_t>() : 0];
  }
};

// The velocities lie in memory as x does; `size` counts the elements of the batch.
// registers: 96
template <class T, class U, int kVector>
__global__ void guided_euler_step_kernel(
    int64_t size,
    const T* x,  // (size,)
    EulerStep step,
    const T* start,  // (size,) or absent: then x_next is the mean of it and the step
    T* x_next) {     // (size,)
  const int64_t first = thread_index() * kVector;
  if (first >= size) return;
  const GuidedEuler<T> euler(step);
  using States = Vector<T, kVector>;
  using Velocities = Vector<U, kVector>;
  const auto state = States::load(x + first);
  const auto cond = Velocities::load(step.cond.data.as<const U>() + first);
  Velocities uncond = cond;
  if (step.uncond.data) uncond = Velocities::load(step.uncond.data.as<const U>() + first);
  States begin = state, next;
  if (start) begin = States::load(start + first);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    Compute<T> value = euler.next(to_compute(state[k]), to_compute(cond[k]), to_compute(uncond[k]));
    if (start) value = (to_compute(begin[k]) + value) / 2;
    next[k] = from_compute<T>(value);
  }
  next.store(x_next + first);
}

// Returns the offset of pixel (c, h, w) in the velocity of a sample, be it tokens or an image.
__device__ int64_t velocity_offset(const EulerStep& step, const Extent& image, int c, int h,
                                   int w) {
  if (step.patch_size == 0) {
    return c * step.cond.channel + h * step.cond.row + w * step.cond.column;
  }
  const unsigned size = step.patch_size, row = h % size, column = w % size;
  // Before it lie the pixels of the patches above, of those on its left, and some of its own.
  const int64_t pixels = int64_t(h - row) * image.width + (w - column + row) * size + column;
  return pixels * image.channels + c;
}

// A thread owns a tile: kColumns neighbours in a row, with kChannels channels of each. Images are
// read in vectors of columns, or of channels where there is one column. Of the numbers of a tile,
// ordered (column, channel), tokens have kRun side by side. Threads with the other channels of the
// same columns are neighbours, as these are in tokens.
//
// A tile of 4x4 has 128 bytes in flight where the image is float and the velocities have 16 bits:
// 64 KB on an SM with 512 threads. Single numbers had 16 KB, an H200 needs 24, and so the kernel
// took 32 us at 256x4x64x64, of which 12 are due to the memory's rate.
// registers: 96; 128 for <float, float, *>
template <class T, class U, int kChannels, int kColumns, int kRun>
__global__ void guided_euler_step_of_tokens_kernel(
    Extent tiles,      // (B, C / kChannels, H, W / kColumns)
    Image<const T> x,  // (B, C, H, W)
    EulerStep step,
    Image<const T> start,  // (B, C, H, W) or absent: then x_next is the mean of it and the step
    Image<T> x_next) {     // (B, C, H, W)
  constexpr int kVector = kColumns > 1 ? kColumns : kChannels;
  constexpr int kVectors = kChannels * kColumns / kVector, kRuns = kChannels * kColumns / kRun;
  using States = Packed<T, kVector>;
  using Velocities = Packed<U, kRun>;
  const Extent image{tiles.batch, tiles.channels * kChannels, tiles.height, tiles.width * kColumns};
  const GuidedEuler<T> euler(step);
  for_each_pixel<Layout<1, false>>(tiles, [&](const Pixel& at) {
    const int c = at.c * kChannels, w = at.w * kColumns;
    int64_t offsets[kRuns];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      offsets[j] = velocity_offset(step, image, c, at.h, w + j * kColumns / kRuns);
    }
    States state[kVectors], begin[kVectors];
    Velocities cond[kRuns], uncond[kRuns];
    const auto load_states = [&](const Image<const T>& from, States* to) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        to[i] = States::load(from.at(at.b, c + i, at.h) + w * from.column);
      }
    };
    const auto load_velocities = [&](const ImageView& from, Velocities* to) {
#pragma unroll
      for (int j = 0; j < kRuns; ++j) {
        to[j] = Velocities::load(from.data.as<const U>() + at.b * from.batch + offsets[j]);
      }
    };
    load_states(x, state);
    load_velocities(step.cond, cond);
    if (step.uncond.data) load_velocities(step.uncond, uncond);
    if (start.data) load_states(start, begin);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto next = [&](int k) {
        const int number = k * kVectors + i, j = number / kRun, r = number % kRun;
        const Compute<T> value = euler.next(state[i][k], cond[j][r], uncond[j][r]);
        return start.data ? (begin[i][k] + value) / 2 : value;
      };
      States::of(next).store(x_next.at(at.b, c + i, at.h) + w * x_next.column);
    }
  });
}

// registers: 96; 128 for <*, 1>
template <class T, class U, int kMargin>
__global__ void guided_euler_merge_kernel(Extent extent,
                                          Image<const T> x,  // (B, C, 2h, 2w)
                                          EulerStep step,
                                          Image<const T> base,  // (B, C, h, w)
                                          Image<T> merged,      // (B, C, 2h, 2w)
                                          Statistics statistics_view, Compute<T> low,
                                          Compute<T> high) {
  const Extent image{extent.batch, extent.channels, 2 * extent.height, 2 * extent.width};
  const GuidedEuler<T> euler(step);
  for_each_pixel<AnyLayout>(extent, [&](const Pixel& at) {
    const ChannelStatistics<T, AnyLayout> statistics(statistics_view, at.c);
    Window<T, AnyLayout, 1, kMargin> base_window;
    base_window.load(base, at, extent);
    Window<T, AnyLayout, 2, 0> pixels;
    pixels.load(x, at, extent);
    const U* cond = step.cond.data.as<const U>() + at.b * step.cond.batch;
    const U* uncond = step.uncond.data.as<const U>() + at.b * step.uncond.batch;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int dy = i / 2, dx = i % 2;
      const int64_t offset = velocity_offset(step, image, at.c, 2 * at.h + dy, 2 * at.w + dx);
      // The state is rounded as the result of a step would be.
      const T state = from_compute<T>(euler.next(pixels(0, dy, dx), to_compute(cond[offset]),
                                                 euler.guided ? to_compute(uncond[offset]) : 0));
      pixels(0, dy, dx) = clamped(
          upsample(base_window, 0, dy, dx) + statistics.restore(to_compute(state), 0), low, high);
    }
    pixels.store(merged, at);
  });
}

template <int kChannelsOf, int kColumnsOf, int kRunOf>
struct Tile {
  static constexpr int kChannels = kChannelsOf, kColumns = kColumnsOf, kRun = kRunOf;
};

// Calls body(tile) with the widest tile in which these images and the tokens can be read. For
// doubles that is a single number, as 16 of each tensor would take too many registers.
template <class T, class Body>
void with_tile(const Extent& image, std::initializer_list<ImageView> images, const EulerStep& step,
               Body body) {
  if constexpr (sizeof(T) == 8) {
    body(Tile<1, 1, 1>{});
  } else {
    const bool wide = image.channels % 4 == 0 && is_aligned({step.cond.data, step.uncond.data}) &&
                      step.cond.batch % 8 == 0 && step.uncond.batch % 8 == 0;
    with_layout<4>(image, images, [&](auto layout) {
      using L = decltype(layout);
      if (L::kVector == 1 || (!L::kPlanar && !wide)) {
        body(Tile<1, 1, 1>{});
      } else if (!L::kPlanar) {
        body(Tile<4, 1, 4>{});
      } else if (!wide) {
        body(Tile<1, 4, 1>{});
      } else if (image.channels == 4 && step.patch_size % 2 == 0) {
        body(Tile<4, 4, 8>{});  // two pixels of a token are 16 bytes of 16-bit numbers
      } else {
        body(Tile<4, 4, 4>{});
      }
    });
  }
}

}  // namespace

void guided_euler_step(DType dtype, int64_t size, Address x, EulerStep step, Address start,
                       Address x_next, Address stream) {
  if (size == 0) return;
  with_types(dtype, step.dtype, [&](auto type, auto velocity_type) {
    using T = typename decltype(type)::type;
    using U = typename decltype(velocity_type)::type;
    constexpr int kVector = 16 / (sizeof(T) < sizeof(U) ? sizeof(T) : sizeof(U));
    const bool wide =
        size % kVector == 0 && is_aligned({x, step.cond.data, step.uncond.data, start, x_next});
    with_flag(wide, [&](auto flag) {
      constexpr int V = decltype(flag)::value ? kVector : 1;
      launch<guided_euler_step_kernel<T, U, V>>(dim3(blocks(size / V)), dim3(kThreads), 0,
                                                cuda_stream(stream), size, x.as<const T>(), step,
                                                start.as<const T>(), x_next.as<T>());
    });
  });
}

void guided_euler_step_of_tokens(DType dtype, Extent extent, ImageView x, EulerStep step,
                                 ImageView start, ImageView x_next, Address stream) {
  with_types(dtype, step.dtype, [&](auto type, auto velocity_type) {
    using T = typename decltype(type)::type;
    using U = typename decltype(velocity_type)::type;
    with_tile<T>(extent, {x, start, x_next}, step, [&](auto tile) {
      using Tile = decltype(tile);
      const Extent tiles{extent.batch, extent.channels / Tile::kChannels, extent.height,
                         extent.width / Tile::kColumns};
      launch_pixels<Layout<1, false>, guided_euler_step_of_tokens_kernel<
                                          T, U, Tile::kChannels, Tile::kColumns, Tile::kRun>>(
          tiles, stream, Image<const T>(x), step, Image<const T>(start), Image<T>(x_next));
    });
  });
}

void guided_euler_merge(DType dtype, Extent extent, ImageView x, EulerStep step, ImageView base,
                        ImageView merged, Statistics statistics, bool bilinear, Clamp clamp,
                        Address stream) {
  with_types(dtype, step.dtype, [&](auto type, auto velocity_type) {
    using T = typename decltype(type)::type;
    using U = typename decltype(velocity_type)::type;
    with_flag(bilinear, [&](auto flag) {
      launch_pixels<AnyLayout, guided_euler_merge_kernel<T, U, decltype(flag)::value>>(
          extent, stream, Image<const T>(x), step, Image<const T>(base), Image<T>(merged),
          statistics, Compute<T>(clamp.low), Compute<T>(clamp.high));
    });
  });
}

}  // namespace msf
