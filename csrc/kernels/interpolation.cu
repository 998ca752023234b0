// flow_interpolate. The equation is in msf_kernels/interpolation/reference.py. Operations follow
// its order, so results agree bit for bit.
#include "dispatch.cuh"
#include "interpolation.hpp"
#include "launch.cuh"

namespace msf {
namespace {

// Blocks are (vectors of a sample, samples).
// registers: 96
template <class T, int kVector>
__global__ void flow_interpolate_kernel(int64_t batch, int64_t size,
                                        const T* data,        // (batch, size)
                                        const T* noise,       // (batch, size)
                                        const Compute<T>* t,  // (batch,)
                                        T* x_t,               // (batch, size)
                                        T* velocity) {        // (batch, size)
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
      launch<flow_interpolate_kernel<T, V>>(
          dim3(blocks(size / V), grid_rows(batch)), dim3(kThreads), 0, cuda_stream(stream), batch,
          size, data.as<const T>(), noise.as<const T>(), t.as<const Compute<T>>(), x_t.as<T>(),
          velocity.as<T>());
    });
  });
}

}  // namespace msf
