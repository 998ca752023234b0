"""Calls of the CUDA kernels in csrc/kernels/tokens.cu."""

from __future__ import annotations

from torch import Tensor

from ..cuda_support.launch import address, dtype, launch
from ..layout import empty_like


def merge_tokens(
    base: Tensor, skip: Tensor, position: Tensor | None, height: int, width: int
) -> Tensor:
    batch, _, channels = skip.shape
    base, skip = base.contiguous(), skip.contiguous()
    position = None if position is None else position.contiguous()
    x = empty_like(skip)
    launch(
        "merge_tokens",
        x,
        dtype(x),
        dtype(x if position is None else position),
        (batch, height, width, channels),
        address(base),
        address(skip),
        address(position),
        address(x),
    )
    return x


def merge_tokens_backward(
    grad: Tensor, position: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = grad.shape
    grad = grad.contiguous()
    grad_base = grad.new_empty((batch, tokens // 4, 4 * channels))
    grad_position = None if position is None else empty_like(position)
    launch(
        "merge_tokens_backward",
        grad,
        dtype(grad),
        dtype(grad if position is None else position),
        (batch, height, width, channels),
        address(grad),
        address(grad_base),
        address(grad_position),
    )
    return grad_base, grad.new_empty(0) if grad_position is None else grad_position
