// The instructions of a warp on small matrices, ldmatrix and mma.sync, with the layouts of the PTX
// ISA ("Warp-level matrix instructions").
//
// Lane l holds of row l / 4 of an 8 x 8 matrix of 16-bit elements the columns 2 (l % 4) and the
// next, in the low and the high half of a register. Larger operands are such matrices side by side.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.hpp"
#include "matrix_flops.hpp"
#include "synchronization.hpp"

namespace msf::emulation {

constexpr unsigned kAllLanes = 0xffffffffu;

// Loads kMatrices matrices into a register each. Lane l gives the address of row l % 8 of matrix
// l / 8, 16 bytes in shared memory; the addresses of lanes beyond the last matrix are not used.
template <int kMatrices>
void load_matrices(uint32_t (&to)[kMatrices], const void* row, bool transposed, Site site) {
  struct Row {
    uint16_t elements[8];
  } mine{};
  struct Registers {
    uint32_t values[kMatrices];
  };
  if (self->lane < 8 * kMatrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16) {
      fail(describe(site) + ": the address of a row is not a multiple of 16");
    }
    std::memcpy(&mine, row, sizeof mine);  // each lane its own, so that sanitizers see who reads
  }
  auto take = [transposed](unsigned lane, Lanes<Row> rows) {
    auto element = [&](unsigned matrix, unsigned row, unsigned column) {
      return uint32_t(rows[8 * matrix + row]->elements[column]);
    };
    Registers taken;
    const unsigned a = lane / 4, b = lane % 4 * 2;
    for (unsigned i = 0; i < kMatrices; ++i) {
      taken.values[i] = transposed ? element(i, b, a) | element(i, b + 1, a) << 16
                                   : element(i, a, b) | element(i, a, b + 1) << 16;
    }
    return taken;
  };
  const auto taken = collective<Registers>(kAllLanes, site, mine, take);
  std::memcpy(to, taken.values, sizeof to);
}

inline float widen(uint16_t bits, __half*) { return __half2float({bits}); }
inline float widen(uint16_t bits, __nv_bfloat16*) { return __bfloat162float({bits}); }

// c (16 x 8) += a (16 x kDepth) b (kDepth x 8), c in float. Registers follow each other over the
// rows of a, then over the depth. Of c a lane holds two columns of row l / 4 and of row l / 4 + 8;
// of b, whose columns are stored as rows, two rows of column l / 4 in each register.
//
// The device adds the products of an instruction in an order and with a rounding of its own.
template <class T, int kDepth>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[kDepth / 4],
                       const uint32_t (&b)[kDepth / 8], Site site) {
  struct Operands {
    uint16_t a[kDepth / 4][2], b[kDepth / 8][2];
    float c[4];
  } mine;
  struct Sums {
    float c[4];
  };
  if (self->lane == 0) matrix_flops += 2 * 16 * 8 * kDepth;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  std::memcpy(mine.c, c, sizeof mine.c);
  auto sum = [](unsigned lane, Lanes<Operands> lanes) {
    Sums sums;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4, column = lane % 4 * 2 + i % 2, lower = i / 2;
      float total = lanes[lane]->c[i];
      for (unsigned k = 0; k < kDepth; ++k) {
        const unsigned owner = k % 8 / 2, matrix = k / 8;
        const uint16_t x = lanes[row * 4 + owner]->a[2 * matrix + lower][k % 2];
        const uint16_t y = lanes[column * 4 + owner]->b[matrix][k % 2];
        total += widen(x, static_cast<T*>(nullptr)) * widen(y, static_cast<T*>(nullptr));
      }
      sums.c[i] = total;
    }
    return sums;
  };
  const auto sums = collective<Sums>(kAllLanes, site, mine, sum);
  std::memcpy(c, sums.c, sizeof c);
}

}  // namespace msf::emulation
