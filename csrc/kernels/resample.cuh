// Pooling and upsampling by 2 in a thread's registers. Additions follow the order of
// msf_kernels/pyramid/reference.py, so results agree with it bit for bit.
#pragma once

#include "image.cuh"

namespace msf {

// Returns the average of the 2x2 pixels of base pixel k.
template <class T, class L, int kMargin>
__device__ Compute<T> pool(Window<T, L, 2, kMargin>& x, int k) {
  return ((x(k, 0, 0) + x(k, 1, 0)) + (x(k, 0, 1) + x(k, 1, 1))) / 4;
}

// Returns pixel (dy, dx) of the 2x2 pixels that base pixel k becomes.
template <class T, class L, int kMargin>
__device__ Compute<T> upsample(Window<T, L, 1, kMargin>& base, int k, int dy, int dx) {
  if constexpr (kMargin == 0) {
    return base(k, 0, 0);
  } else {
    using C = Compute<T>;
    const int row = dy ? 1 : -1, column = dx ? 1 : -1;
    const C near = C(0.75) * base(k, 0, 0) + C(0.25) * base(k, row, 0);
    const C next = C(0.75) * base(k, 0, column) + C(0.25) * base(k, row, column);
    return C(0.75) * near + C(0.25) * next;
  }
}

// Does as upsample for kColumns pixels of a row, from pixel (h, w) of channel c on. The threads
// that own the two rows above a base pixel both read it, the second from L1.
template <bool kBilinear, int kColumns, class T>
__device__ void upsample_row(const Image<const T>& base, const Extent& image, int b, int c,
                             unsigned h, unsigned w, Compute<T>* upsampled) {
  using C = Compute<T>;
  const auto inside = [](int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; };
  const int other = inside(int(h / 2) + (h % 2 ? 1 : -1), image.height / 2);
  const T *near = base.at(b, c, h / 2), *next = base.at(b, c, other);
  const auto between_rows = [&](int column) {
    return C(0.75) * to_compute(near[column * base.column]) +
           C(0.25) * to_compute(next[column * base.column]);
  };
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    const int column = (w + k) / 2;
    if (!kBilinear) {
      upsampled[k] = to_compute(near[column * base.column]);
    } else {
      int beside = column + ((w + k) % 2 ? 1 : -1);
      if (k == 0 || k == kColumns - 1) beside = inside(beside, image.width / 2);
      upsampled[k] = C(0.75) * between_rows(column) + C(0.25) * between_rows(beside);
    }
  }
}

// The adjoint of upsample: returns the gradient of base pixel k, given that of the larger image.
template <class T, class L, int kMargin>
__device__ Compute<T> upsample_adjoint(Window<T, L, 2, kMargin>& grad, int k) {
  if constexpr (kMargin == 0) {
    return pool(grad, k) * 4;
  } else {
    using C = Compute<T>;
    C columns[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      columns[j] = C(0.75) * (grad(k, 0, j - 1) + grad(k, 1, j - 1)) +
                   C(0.25) * (grad(k, 2, j - 1) + grad(k, -1, j - 1));
    }
    return C(0.75) * (columns[1] + columns[2]) + C(0.25) * (columns[3] + columns[0]);
  }
}

// Limits a value by comparisons, because fminf and fmaxf drop NaN.
template <class C>
__device__ C clamped(C value, C low, C high) {
  return value < low ? low : value > high ? high : value;
}

}  // namespace msf
