// flow_interpolate, guided_euler_step and guided_euler_merge. The equations are in
// msf_kernels/flow/reference.py; operations follow its order, so results agree bit for bit.
#include "dispatch.cuh"
#include "resample.cuh"

namespace msf {
namespace {

// Blocks are (vectors of a sample, samples).
template <class T, int kVector>
__global__ void flow_interpolate_kernel(int64_t batch, int64_t size, const T* data, const T* noise,
                                        const Compute<T>* t, T* x_t, T* velocity) {
  const int64_t first = thread_index() * kVector;
  if (first >= size) return;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const int64_t at = b * size + first;
    const Compute<T> time = t[b];
    const auto end = Vector<T, kVector>::load(data + at);
    const auto start = Vector<T, kVector>::load(noise + at);
    Vector<T, kVector> x, v;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const Compute<T> to = to_compute(end[k]), from = to_compute(start[k]);
      x[k] = from_compute<T>((1 - time) * from + time * to);
      v[k] = from_compute<T>(to - from);
    }
    x.store(x_t + at);
    v.store(velocity + at);
  }
}

// What a step does to one number. T is the state's type, U the velocities'.
template <class T, class U>
struct Step {
  using C = Compute<T>;
  C scale, dt;
  bool guided;

  __device__ Step(const Velocity& velocity)
      : scale(read(velocity.guidance_scale, velocity.step)),
        dt(read(velocity.dt, velocity.step)),
        guided(bool(velocity.uncond.data)) {}

  __device__ C euler(C x, const U* cond, const U* uncond, int64_t at) const {
    C v = to_compute(cond[at]);
    if (guided) {
      const C wide = to_compute(uncond[at]);
      v = wide + scale * (v - wide);
    }
    return x + dt * v;
  }

 private:
  __device__ static C read(const Scalar& scalar, const Address& step) {
    if (!scalar.table) return C(scalar.value);
    return scalar.table.as<const C>()[step ? *step.as<const int64_t>() : 0];
  }
};

template <class T, class U, int kVector>
__global__ void guided_euler_step_kernel(int64_t size, const T* x, Velocity velocity,
                                         const T* start, T* x_next) {
  const int64_t first = thread_index() * kVector;
  if (first >= size) return;
  const Step<T, U> step(velocity);
  using States = Vector<T, kVector>;
  using Velocities = Vector<U, kVector>;
  const auto state = States::load(x + first);
  const auto cond = Velocities::load(velocity.cond.data.as<const U>() + first);
  Velocities uncond = cond;
  if (velocity.uncond.data) uncond = Velocities::load(velocity.uncond.data.as<const U>() + first);
  States begin = state, next;
  if (start) begin = States::load(start + first);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    Compute<T> value = step.euler(to_compute(state[k]), cond.elements, uncond.elements, k);
    if (start) value = (to_compute(begin[k]) + value) / 2;
    next[k] = from_compute<T>(value);
  }
  next.store(x_next + first);
}

// Where the pixel (c, h, w) of a sample lies in its tokens, or in its image without patches.
__device__ int64_t velocity_offset(const Velocity& velocity, const Extent& image, int c, int h,
                                   int w) {
  const int p = velocity.patch;
  if (p == 0) return c * velocity.cond.channel + h * velocity.cond.row + w * velocity.cond.column;
  const int64_t token = int64_t(h / p) * (image.width / p) + w / p;
  return (token * p * p + h % p * p + w % p) * image.channels + c;
}

// A thread owns a pixel of all channels, which are neighbours in its token.
template <class T, class U>
__global__ void guided_euler_step_of_tokens_kernel(Extent image, Image<const T> x,
                                                   Velocity velocity, Image<const T> start,
                                                   Image<T> x_next) {
  const int64_t index = thread_index();
  if (index >= int64_t(image.batch) * image.height * image.width) return;
  const int w = index % image.width, h = index / image.width % image.height;
  const int b = index / image.width / image.height;
  const Step<T, U> step(velocity);
  const U* cond = velocity.cond.data.as<const U>() + b * velocity.cond.batch;
  const U* uncond = velocity.uncond.data.as<const U>() + b * velocity.uncond.batch;
  for (int c = 0; c < image.channels; ++c) {
    const int64_t at = velocity_offset(velocity, image, c, h, w);
    Compute<T> value = step.euler(to_compute(x.at(b, c, h)[w * x.column]), cond, uncond, at);
    if (start.data) value = (to_compute(start.at(b, c, h)[w * start.column]) + value) / 2;
    x_next.at(b, c, h)[w * x_next.column] = from_compute<T>(value);
  }
}

template <class T, class U, int kMargin>
__global__ void guided_euler_merge_kernel(Extent extent, Image<const T> x, Velocity velocity,
                                          Image<const T> base, Image<T> merged,
                                          Statistics statistics_view, Compute<T> low,
                                          Compute<T> high) {
  const Extent image{extent.batch, extent.channels, 2 * extent.height, 2 * extent.width};
  const Step<T, U> step(velocity);
  for_each_place<AnyLayout>(extent, [&](const Place& p) {
    const ChannelStatistics<T, AnyLayout> statistics(statistics_view, p.c);
    Patch<T, AnyLayout, 1, kMargin> below;
    below.load(base, p, extent);
    Patch<T, AnyLayout, 2, 0> pixels;
    pixels.load(x, p, extent);
    const U* cond = velocity.cond.data.as<const U>() + p.b * velocity.cond.batch;
    const U* uncond = velocity.uncond.data.as<const U>() + p.b * velocity.uncond.batch;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int dy = i / 2, dx = i % 2;
      const int64_t at = velocity_offset(velocity, image, p.c, 2 * p.h + dy, 2 * p.w + dx);
      // Rounded as the step's own result would be.
      const T state = from_compute<T>(step.euler(pixels(0, dy, dx), cond, uncond, at));
      pixels(0, dy, dx) =
          clamped(upsample(below, 0, dy, dx) + statistics.restore(to_compute(state), 0), low, high);
    }
    pixels.store(merged, p);
  });
}

}  // namespace

void flow_interpolate(DType dtype, int64_t batch, int64_t size, Address data, Address noise,
                      Address t, Address x_t, Address velocity, Address stream) {
  if (batch == 0 || size == 0) return;
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kVector = 16 / sizeof(T);
    const bool wide = size % kVector == 0 && is_aligned({data, noise, x_t, velocity});
    with_flag(wide, [&](auto flag) {
      constexpr int V = decltype(flag)::value ? kVector : 1;
      launch(flow_interpolate_kernel<T, V>, dim3(blocks(size / V), grid_rows(batch)),
             dim3(kThreads), 0, cuda_stream(stream), batch, size, data.as<const T>(),
             noise.as<const T>(), t.as<const Compute<T>>(), x_t.as<T>(), velocity.as<T>());
    });
  });
}

void guided_euler_step(DType dtype, int64_t size, Address x, Velocity velocity, Address start,
                       Address x_next, Address stream) {
  if (size == 0) return;
  with_types(dtype, velocity.dtype, [&](auto type, auto velocity_type) {
    using T = typename decltype(type)::type;
    using U = typename decltype(velocity_type)::type;
    constexpr int kVector = 16 / (sizeof(T) < sizeof(U) ? sizeof(T) : sizeof(U));
    const bool wide = size % kVector == 0 &&
                      is_aligned({x, velocity.cond.data, velocity.uncond.data, start, x_next});
    with_flag(wide, [&](auto flag) {
      constexpr int V = decltype(flag)::value ? kVector : 1;
      launch(guided_euler_step_kernel<T, U, V>, dim3(blocks(size / V)), dim3(kThreads), 0,
             cuda_stream(stream), size, x.as<const T>(), velocity, start.as<const T>(),
             x_next.as<T>());
    });
  });
}

void guided_euler_step_of_tokens(DType dtype, Extent extent, ImageView x, Velocity velocity,
                                 ImageView start, ImageView x_next, Address stream) {
  const int64_t pixels = int64_t(extent.batch) * extent.height * extent.width;
  if (pixels == 0) return;
  with_types(dtype, velocity.dtype, [&](auto type, auto velocity_type) {
    using T = typename decltype(type)::type;
    using U = typename decltype(velocity_type)::type;
    launch(guided_euler_step_of_tokens_kernel<T, U>, dim3(blocks(pixels)), dim3(kThreads), 0,
           cuda_stream(stream), extent, Image<const T>(x), velocity, Image<const T>(start),
           Image<T>(x_next));
  });
}

void guided_euler_merge(DType dtype, Extent extent, ImageView x, Velocity velocity, ImageView base,
                        ImageView merged, Statistics statistics, bool bilinear, Clamp clamp,
                        Address stream) {
  with_types(dtype, velocity.dtype, [&](auto type, auto velocity_type) {
    using T = typename decltype(type)::type;
    using U = typename decltype(velocity_type)::type;
    with_flag(bilinear, [&](auto flag) {
      launch_places<AnyLayout>(guided_euler_merge_kernel<T, U, decltype(flag)::value>, extent,
                               stream, Image<const T>(x), velocity, Image<const T>(base),
                               Image<T>(merged), statistics, Compute<T>(clamp.low),
                               Compute<T>(clamp.high));
    });
  });
}

}  // namespace msf
