"""merge_tokens between the scales of a multi-patch transformer, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import msf_kernels

from ..registry import Benchmark, Shape, normal

# (B, H, W, D) of the fine grid. Widths S and XL of DiT at 256 pixels and patches of 2; the second
# moves 450 MB in bfloat16.
SHAPES: tuple[Shape, ...] = (
    (64, 16, 16, 1152),
    (256, 16, 16, 1152),
    (1, 16, 16, 1152),
    (1, 16, 16, 384),
)


def inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    batch, height, width, channels = shape
    tokens = height * width
    base = normal((batch, tokens // 4, 4 * channels), dtype, generator)
    skip = normal((batch, tokens, channels), dtype, generator)
    return base, skip, normal((tokens, channels), torch.float32, generator)


def grid(position: Tensor) -> tuple[int, int]:
    """(h, w) of the coarse grid, the fine one being square."""
    side = round(len(position) ** 0.5)
    return side // 2, side // 2


def merge(base: Tensor, skip: Tensor, position: Tensor) -> Tensor:
    height, width = grid(position)
    batch, tokens, channels = skip.shape
    x = base.view(batch, height, width, 2, 2, channels).transpose(2, 3)
    return (x.reshape(batch, tokens, channels).float() + skip + position).to(skip.dtype)


def ours(base: Tensor, skip: Tensor, position: Tensor) -> Tensor:
    return msf_kernels.merge_tokens(base, skip, position, grid=grid(position))


FORWARD = Benchmark(
    op="merge_tokens",
    inputs=inputs,
    ours=ours,
    eager=merge,
    bytes=lambda base, skip, position: base.nbytes + 2 * skip.nbytes + position.nbytes,
    terms=3,
    shapes=SHAPES,
)
# The gradient of skip is that of the output itself, so nothing is read or written for it.
BACKWARD = replace(
    FORWARD, gradients=2, bytes=lambda base, skip, position: skip.nbytes + base.nbytes
)
BENCHMARKS = [FORWARD, BACKWARD]
