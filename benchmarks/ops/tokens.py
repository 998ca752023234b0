"""Benchmarks of merge_tokens between a multi-patch transformer's scales, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from msf_kernels.examples import Shape
from msf_kernels.tokens.examples import EXAMPLES

from ..registry import Benchmark

# (B, H, W, D) of the fine grid: the widths of DiT-S and XL at 256 pixels and patches of 2. The
# second shape moves 450 MB in bfloat16.
SHAPES: tuple[Shape, ...] = (
    (64, 16, 16, 1152),
    (256, 16, 16, 1152),
    (1, 16, 16, 1152),
    (1, 16, 16, 384),
)


def merge(base: Tensor, skip: Tensor, position: Tensor, grid: tuple[int, int]) -> Tensor:
    batch, tokens, channels = skip.shape
    x = base.view(batch, *grid, 2, 2, channels).transpose(2, 3)
    return (x.reshape(batch, tokens, channels).float() + skip + position).to(skip.dtype)


def merge_behind(
    base: Tensor, skip: Tensor, position: Tensor, condition: Tensor, grid: tuple[int, int]
) -> Tensor:
    return torch.cat((condition, merge(base, skip, position, grid)), 1)


FORWARD = Benchmark(
    example=EXAMPLES[0],
    eager=merge,
    bytes=lambda base, skip, position, grid: base.nbytes + 2 * skip.nbytes + position.nbytes,
    terms=3,
    shapes=SHAPES,
)
# The gradient of skip is that of the output itself, so nothing is read or written for it.
BACKWARD = replace(
    FORWARD, gradients=2, bytes=lambda base, skip, position, grid: skip.nbytes + base.nbytes
)
BEHIND = replace(
    FORWARD,
    example=EXAMPLES[2],
    eager=merge_behind,
    bytes=lambda base, skip, position, condition, grid: (
        base.nbytes + 2 * skip.nbytes + position.nbytes + 2 * condition.nbytes
    ),
)
BENCHMARKS = [FORWARD, BACKWARD, BEHIND]
