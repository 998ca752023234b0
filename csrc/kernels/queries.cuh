// The queries of a warp, which attend to keys in the shared memory of their block.
#pragma once

#include "attention.cuh"

namespace msf {

constexpr int kChunk = 2;  // 16-key groups that are scored before their softmax

// The probabilities of a row lie between 0 and 2^kHeadroom: they are rescaled where a score would
// exceed that, and not for each new maximum.
constexpr float kHeadroom = 8;

// kCount tiles of queries of a warp, and what has been summed for them over the keys so far. In
// each tile a lane has rows l / 4 and l / 4 + 8.
template <class T, int kDim, int kCount>
struct Queries {
  static constexpr int kColumns = kDim / 8;
  Operand<T, kDim> q[kCount];
  float out[kCount][kColumns][4] = {};
  float total[kCount][2] = {};  // of the lane's own columns
  float largest[kCount][2];     // in units of log2: what has been subtracted from the scores
  float scale;                  // log2(e) / sqrt(d)

  // Takes queries from rows of the warp.
  __device__ Queries(const Rows<T, kDim>& rows, float scale) : scale(scale) {
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile) {
      q[tile].load(rows, 16 * tile);
      largest[tile][0] = largest[tile][1] = -INFINITY;
    }
  }

  // Attends to keys [0, count) in shared memory, whose rows are there up to a multiple of 16.
  __device__ void attend(const Rows<T, kDim>& keys, const Rows<T, kDim>& values, int count) {
    int first = 0;
    for (; first + 16 * (kChunk - 1) < count; first += 16 * kChunk) {
      attend_chunk<kChunk>(keys, values, first, count - first);
    }
    if (first < count) attend_chunk<1>(keys, values, first, count - first);
  }

  // Leaves the outputs, rounded, in rows of the warp, and writes the logsumexp of those that exist.
  // The bias of v is added here: the weights of a query's values add up to 1.
  __device__ void finish(const Rows<T, kDim>& rows, const float* bias, float* logsumexp,
                         int existing) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
      const int tile = i / 2, lower = i % 2, row = threadIdx.x % kWarp / 4 + 8 * i;
      const float sum = quad_sum(total[tile][lower]), factor = 1 / sum;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const auto& sums = out[tile][j];
        float low = sums[2 * lower] * factor, high = sums[2 * lower + 1] * factor;
        if (bias) {
          low += bias[8 * j + 2 * lane];
          high += bias[8 * j + 2 * lane + 1];
        }
        rows.words(row, lane)[4 * j] = pack<T>(low, high);
      }
      if (logsumexp && lane == 0 && row < existing) {
        logsumexp[row] = (largest[tile][lower] + log2f(sum)) * kLn2;
      }
    }
  }

 private:
  template <int kGroups>
  __device__ void attend_chunk(const Rows<T, kDim>& keys, const Rows<T, kDim>& values, int first,
                               int count) {
    float scores[kCount][2 * kGroups][4] = {};
    add_scores(scores, q, keys, first);
    if (count < 16 * kGroups) mask(scores, count);
    uint32_t probabilities[kCount][2 * kGroups][2];
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile) {
      rescale(scores[tile], tile);
      softmax(probabilities[tile], scores[tile], tile);
    }
    add_weighted(out, probabilities, values, first);
  }

  // Subtracts more from the scores of the tile where some of the warp's would pass the headroom.
  template <int kScores>
  __device__ void rescale(const float (&scores)[kScores][4], int tile) {
    float high[2] = {scores[0][0], scores[0][2]};
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      high[0] = fmaxf(high[0], fmaxf(scores[i][0], scores[i][1]));
      high[1] = fmaxf(high[1], fmaxf(scores[i][2], scores[i][3]));
    }
    const bool passes = high[0] * scale > largest[tile][0] + kHeadroom ||
                        high[1] * scale > largest[tile][1] + kHeadroom;
    if (!__any_sync(kAllLanes, passes)) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float before = largest[tile][row];
      largest[tile][row] = fmaxf(before, quad_max(high[row]) * scale);
      const float factor = exp2_fast(before - largest[tile][row]);
      total[tile][row] *= factor;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        out[tile][j][2 * row] *= factor;
        out[tile][j][2 * row + 1] *= factor;
      }
    }
  }

  template <int kScores>
  __device__ void softmax(uint32_t (&probabilities)[kScores][2], const float (&scores)[kScores][4],
                          int tile) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float low = exp2_fast(fmaf(scores[i][2 * row], scale, -largest[tile][row]));
        const float high = exp2_fast(fmaf(scores[i][2 * row + 1], scale, -largest[tile][row]));
        total[tile][row] += low + high;
        probabilities[i][row] = pack<T>(low, high);
      }
    }
  }
};

}  // namespace msf
