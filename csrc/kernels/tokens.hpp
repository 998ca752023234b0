#pragma once

#include "../types.hpp"

namespace msf {

// Tokens (B, N, D) whose samples are contiguous, `batch` elements from one to the next. Absent ones
// have no data.
struct TokensView {
  Address data;
  int64_t batch = 0;
};

// The sizes of merge_tokens: base is (B, h * w, 4 * D), position (4 * h * w, D), condition (B, C,
// D), x (B, C + 4 * h * w, D), all other tensors are (B, 4 * h * w, D), and what is given by its
// address is contiguous. position has the dtype of the others or float32.
struct TokenGrid {
  int batch, height, width, channels;  // B, h, w and D
};

void merge_tokens(DType dtype, DType position_dtype, TokenGrid grid, TokensView base,
                  TokensView skip, Address position, TokensView condition, int condition_tokens,
                  Address x, Address stream);
void merge_tokens_backward(DType dtype, DType position_dtype, TokenGrid grid, TokensView grad,
                           Address grad_base, Address grad_position, Address stream);

}  // namespace msf
