// guided_euler_step and guided_euler_merge. The equations are in msf_kernels/euler/reference.py.
// Operations follow its order, so results agree bit for bit.
#include "dispatch.cuh"
#include "launch.cuh"
#include "resample.cuh"

namespace msf {
namespace {

// The guided Euler step of one number: x + dt v, where guidance sets
// v = v_uncond + guidance_scale (v_cond - v_uncond). T is the type of the state, U of the
// velocities.
template <class T, class U>
struct GuidedEuler {
  using C = Compute<T>;
  C scale, dt;
  bool guided;

  __device__ explicit GuidedEuler(const EulerStep& step)
      : scale(read(step.guidance_scale, step.index)),
        dt(read(step.dt, step.index)),
        guided(bool(step.uncond.data)) {}

  __device__ C next(C x, const U* cond, const U* uncond, int64_t offset) const {
    C v = to_compute(cond[offset]);
    if (guided) {
      const C v_uncond = to_compute(uncond[offset]);
      v = v_uncond + scale * (v - v_uncond);
    }
    return x + dt * v;
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
  const GuidedEuler<T, U> euler(step);
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
    Compute<T> value = euler.next(to_compute(state[k]), cond.elements, uncond.elements, k);
    if (start) value = (to_compute(begin[k]) + value) / 2;
    next[k] = from_compute<T>(value);
  }
  next.store(x_next + first);
}

// Returns the offset of pixel (c, h, w) in the velocity of a sample, be it tokens or an image.
__device__ int64_t velocity_offset(const EulerStep& step, const Extent& image, int c, int h,
                                   int w) {
  const int size = step.patch_size;
  if (size == 0) return c * step.cond.channel + h * step.cond.row + w * step.cond.column;
  const int64_t token = int64_t(h / size) * (image.width / size) + w / size;
  return (token * size * size + h % size * size + w % size) * image.channels + c;
}

// A thread owns all channels of a pixel, which are neighbours in its token.
// registers: 96
template <class T, class U>
__global__ void guided_euler_step_of_tokens_kernel(
    Extent image,
    Image<const T> x,  // (B, C, H, W)
    EulerStep step,
    Image<const T> start,  // (B, C, H, W) or absent: then x_next is the mean of it and the step
    Image<T> x_next) {     // (B, C, H, W)
  const int64_t index = thread_index();
  if (index >= int64_t(image.batch) * image.height * image.width) return;
  const int w = index % image.width, h = index / image.width % image.height;
  const int b = index / image.width / image.height;
  const GuidedEuler<T, U> euler(step);
  const U* cond = step.cond.data.as<const U>() + b * step.cond.batch;
  const U* uncond = step.uncond.data.as<const U>() + b * step.uncond.batch;
  for (int c = 0; c < image.channels; ++c) {
    const int64_t offset = velocity_offset(step, image, c, h, w);
    Compute<T> value = euler.next(to_compute(x.at(b, c, h)[w * x.column]), cond, uncond, offset);
    if (start.data) value = (to_compute(start.at(b, c, h)[w * start.column]) + value) / 2;
    x_next.at(b, c, h)[w * x_next.column] = from_compute<T>(value);
  }
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
  const GuidedEuler<T, U> euler(step);
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
      const T state = from_compute<T>(euler.next(pixels(0, dy, dx), cond, uncond, offset));
      pixels(0, dy, dx) = clamped(
          upsample(base_window, 0, dy, dx) + statistics.restore(to_compute(state), 0), low, high);
    }
    pixels.store(merged, at);
  });
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
  const int64_t pixels = int64_t(extent.batch) * extent.height * extent.width;
  if (pixels == 0) return;
  with_types(dtype, step.dtype, [&](auto type, auto velocity_type) {
    using T = typename decltype(type)::type;
    using U = typename decltype(velocity_type)::type;
    launch<guided_euler_step_of_tokens_kernel<T, U>>(dim3(blocks(pixels)), dim3(kThreads), 0,
                                                     cuda_stream(stream), extent, Image<const T>(x),
                                                     step, Image<const T>(start), Image<T>(x_next));
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
