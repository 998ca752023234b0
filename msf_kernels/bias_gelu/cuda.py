"""Calls of the CUDA kernels in csrc/kernels/bias_gelu.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cuda_support.launch import address, dtype, launch, parameter
from ..dtypes import compute_dtype
from ..grid import TARGET_BLOCKS
from ..layout import contiguous, empty_like
from .op import new_gradients

# A block is 64 vectors of 16 bytes wide and takes 8 rows at a time.
WIDTH, STEP = 64 * 16, 8

# In forward an SM gets some 16 blocks or more, of which 5 run at once; 32 rows a block are enough
# to read its part of the bias once for all. In backward it gets the 3 that run at once. Each then
# writes a row of sums, which costs the traffic of 1.3 rows.
FORWARD_BLOCKS, MAX_FORWARD_ROWS = 4 * TARGET_BLOCKS, 32
BACKWARD_BLOCKS, MIN_BACKWARD_ROWS = 3 * TARGET_BLOCKS // 4, 16


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    x, bias = contiguous(x, 16), contiguous(bias, 16)
    out = empty_like(x)
    rows, across = _extent(x)
    length = min(rows * across // FORWARD_BLOCKS // STEP * STEP, MAX_FORWARD_ROWS)
    launch(
        "bias_gelu",
        x,
        dtype(x),
        rows,
        x.shape[2],
        max(length, STEP),
        approximate == "tanh",
        address(x),
        parameter(bias),
        address(out),
    )
    return out


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    grad, x, bias = contiguous(grad, 16), contiguous(x, 16), contiguous(bias, 16)
    grad_x, grad_bias = new_gradients(x, bias)
    rows, across = _extent(x)
    slices = max(BACKWARD_BLOCKS // across, 1)
    length = max(math.ceil(rows / slices / STEP) * STEP, MIN_BACKWARD_ROWS)
    partials = None
    if bias is not None:
        shape = math.ceil(rows / length), x.shape[2]
        partials = x.new_empty(shape, dtype=compute_dtype(x))
    launch(
        "bias_gelu_backward",
        x,
        dtype(x),
        rows,
        x.shape[2],
        length,
        approximate == "tanh",
        address(grad),
        address(x),
        parameter(bias),
        address(grad_x),
        parameter(grad_bias),
        address(partials),
    )
    return grad_x, grad_bias


def _extent(x: Tensor) -> tuple[int, int]:
    """Return how many rows x (B, N, D) has, and how many blocks are as wide as one."""
    batch, tokens, channels = x.shape
    vectors = channels * x.element_size() % 16 == 0 and x.dtype != torch.float64
    width = WIDTH // x.element_size() if vectors else WIDTH // 16
    return batch * tokens, max(math.ceil(channels / width), 1)
