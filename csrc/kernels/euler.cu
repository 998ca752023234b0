// guided_euler_step and guided_euler_merge. The equations are in msf_kernels/euler/reference.py.
// Operations follow its order, so results agree bit for bit.
#include "dispatch.cuh"
#include "euler.hpp"
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
// ordered (column, channel), velocities have kRun side by side.
template <int kChannelsOf, int kColumnsOf, int kRunOf>
struct Tile {
  static constexpr int kChannels = kChannelsOf, kColumns = kColumnsOf, kRun = kRunOf;
  static constexpr int kVector = kColumns > 1 ? kColumns : kChannels;
  static constexpr int kVectors = kChannels * kColumns / kVector;
  static constexpr int kRuns = kChannels * kColumns / kRun;
};

// Threads with the other channels of the same columns are neighbours, as these are in tokens.
using Order = Layout<1, false>;

// The states and velocities of a tile. One of 4x4 has 128 bytes in flight where states are float
// and velocities have 16 bits: 96 KB on an SM with 768 threads. Threads of single numbers had 10,
// or 20 KB where an H200 needs 24, and took 32 us for 256x4x64x64, of which 12 are the memory's.
template <class T, class U, class Tile>
struct Stepped {
  using States = Packed<T, Tile::kVector>;
  using Velocities = Packed<U, Tile::kRun>;
  int b, c, h, w;  // of the first pixel
  States state[Tile::kVectors];
  Velocities cond[Tile::kRuns], uncond[Tile::kRuns];

  __device__ Stepped(const Pixel& tile, const Extent& tiles, const Image<const T>& x,
                     const EulerStep& step)
      : b(tile.b), c(tile.c * Tile::kChannels), h(tile.h), w(tile.w * Tile::kColumns) {
    const Extent image{tiles.batch, tiles.channels * Tile::kChannels, tiles.height,
                       tiles.width * Tile::kColumns};
    int64_t offsets[Tile::kRuns];
#pragma unroll
    for (int j = 0; j < Tile::kRuns; ++j) {
      offsets[j] = velocity_offset(step, image, c, h, w + j * Tile::kColumns / Tile::kRuns);
    }
    load(x, state);
    load(step.cond, offsets, cond);
    if (step.uncond.data) load(step.uncond, offsets, uncond);
  }

  template <class Element>
  __device__ Element* at(const Image<Element>& image, int i) const {
    return image.at(b, c + i, h) + w * image.column;
  }
  __device__ void load(const Image<const T>& image, States* states) const {
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) states[i] = States::load(at(image, i));
  }
  __device__ void load(const ImageView& from, const int64_t* offsets, Velocities* to) const {
#pragma unroll
    for (int j = 0; j < Tile::kRuns; ++j) {
      to[j] = Velocities::load(from.data.as<const U>() + b * from.batch + offsets[j]);
    }
  }

  // Returns element k of vector i after the step.
  __device__ Compute<T> operator()(const GuidedEuler<T>& euler, int i, int k) const {
    const int number = k * Tile::kVectors + i, j = number / Tile::kRun, r = number % Tile::kRun;
    return euler.next(state[i][k], cond[j][r], uncond[j][r]);
  }
};

// At 128 registers an SM has 512 threads with a tile of 4x4 each, which is 64 KB in flight. sm_90
// takes 86, sm_100 and sm_120 up to 127.
// registers: 96; 128 for <*, 4, 4, *>
template <class T, class U, int kChannels, int kColumns, int kRun>
__global__ void guided_euler_step_of_tokens_kernel(
    Extent tiles,      // (B, C / kChannels, H, W / kColumns)
    Image<const T> x,  // (B, C, H, W)
    EulerStep step,
    Image<const T> start,  // (B, C, H, W) or absent: then x_next is the mean of it and the step
    Image<T> x_next) {     // (B, C, H, W)
  using Tile = Tile<kChannels, kColumns, kRun>;
  using States = Packed<T, Tile::kVector>;
  const GuidedEuler<T> euler(step);
  for_each_pixel<Order>(tiles, [&](const Pixel& tile) {
    const Stepped<T, U, Tile> stepped(tile, tiles, x, step);
    States begin[Tile::kVectors];
    if (start.data) stepped.load(start, begin);
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      const auto next = [&](int k) {
        const Compute<T> value = stepped(euler, i, k);
        return start.data ? (begin[i][k] + value) / 2 : value;
      };
      States::of(next).store(stepped.at(x_next, i));
    }
  });
}

// registers: 128; 144 for <*, 4, 4, *>
template <class T, class U, int kChannels, int kColumns, int kRun, bool kBilinear>
__global__ void guided_euler_merge_kernel(Extent tiles,  // (B, C / kChannels, 2h, 2w / kColumns)
                                          Image<const T> x,  // (B, C, 2h, 2w)
                                          EulerStep step,
                                          Image<const T> base,  // (B, C, h, w)
                                          Image<T> merged,      // (B, C, 2h, 2w)
                                          Statistics statistics_view, Compute<T> low,
                                          Compute<T> high) {
  using Tile = Tile<kChannels, kColumns, kRun>;
  using States = Packed<T, Tile::kVector>;
  const Extent image{tiles.batch, tiles.channels * kChannels, tiles.height, tiles.width * kColumns};
  const GuidedEuler<T> euler(step);
  for_each_pixel<Order>(tiles, [&](const Pixel& tile) {
    const Stepped<T, U, Tile> stepped(tile, tiles, x, step);
    Compute<T> upsampled[kChannels][kColumns];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      upsample_row<kBilinear, kColumns>(base, image, stepped.b, stepped.c + i, stepped.h, stepped.w,
                                        upsampled[i]);
    }
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      const ChannelStatistics<T, Layout<Tile::kVector, (kColumns > 1)>> statistics(statistics_view,
                                                                                   stepped.c + i);
      const auto merge = [&](int k) {
        const Compute<T> above = kColumns > 1 ? upsampled[i][k] : upsampled[k][0];
        // The state is rounded as the result of a step would be.
        const T state = from_compute<T>(stepped(euler, i, k));
        return clamped(above + statistics.restore(to_compute(state), k), low, high);
      };
      States::of(merge).store(stepped.at(merged, i));
    }
  });
}

// Calls body(tile, tiles) with the widest tile in which these images and the velocities can be
// read. For doubles it is a single number, as 16 of each tensor would take too many registers.
template <class T, class Body>
void with_tile(const Extent& image, ImageView x, ImageView other, ImageView result,
               const EulerStep& step, Body body) {
  const auto call = [&](auto tile) {
    using Tile = decltype(tile);
    body(tile, Extent{image.batch, image.channels / Tile::kChannels, image.height,
                      image.width / Tile::kColumns});
  };
  if constexpr (sizeof(T) == 8) {
    call(Tile<1, 1, 1>{});
  } else {
    const bool tokens = step.patch_size > 0;
    const bool wide =
        !tokens || (image.channels % 4 == 0 && step.cond.batch % 8 == 0 &&
                    step.uncond.batch % 8 == 0 && is_aligned({step.cond.data, step.uncond.data}));
    const ImageView cond = tokens ? ImageView{} : step.cond;
    const ImageView uncond = tokens ? ImageView{} : step.uncond;
    with_layout<4>(image, {x, other, result, cond, uncond}, [&](auto layout) {
      using L = decltype(layout);
      if (L::kVector == 1 || (!L::kPlanar && !wide)) {
        call(Tile<1, 1, 1>{});
      } else if (!L::kPlanar) {
        call(Tile<4, 1, 4>{});
      } else if (!tokens) {
        call(Tile<1, 4, 4>{});
      } else if (!wide) {
        call(Tile<1, 4, 1>{});
      } else if (image.channels == 4 && step.patch_size % 2 == 0) {
        call(Tile<4, 4, 8>{});  // two pixels of a token are 16 bytes of 16-bit numbers
      } else {
        call(Tile<4, 4, 4>{});
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
    with_tile<T>(extent, x, start, x_next, step, [&](auto tile, const Extent& tiles) {
      using Tile = decltype(tile);
      launch_pixels<Order, guided_euler_step_of_tokens_kernel<T, U, Tile::kChannels, Tile::kColumns,
                                                              Tile::kRun>>(
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
    const Extent image{extent.batch, extent.channels, 2 * extent.height, 2 * extent.width};
    with_tile<T>(image, x, {}, merged, step, [&](auto tile, const Extent& tiles) {
      using Tile = decltype(tile);
      with_flag(bilinear, [&](auto flag) {
        launch_pixels<Order, guided_euler_merge_kernel<T, U, Tile::kChannels, Tile::kColumns,
                                                       Tile::kRun, decltype(flag)::value>>(
            tiles, stream, Image<const T>(x), step, Image<const T>(base), Image<T>(merged),
            statistics, Compute<T>(clamp.low), Compute<T>(clamp.high));
      });
    });
  });
}

}  // namespace msf
