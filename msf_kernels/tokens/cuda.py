"""Calls of the CUDA kernels in csrc/kernels/tokens.cu."""

from __future__ import annotations

from torch import Tensor

from ..cuda_support.launch import address, dtype, launch
from ..layout import contiguous, contiguous_samples, empty_like


def merge_tokens(
    base: Tensor,
    skip: Tensor,
    position: Tensor | None,
    condition: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    batch, tokens, channels = skip.shape
    base, skip = contiguous_samples(base), contiguous_samples(skip)
    position, condition = contiguous(position), contiguous_samples(condition)
    count = 0 if condition is None else condition.shape[1]
    x = skip.new_empty((batch, count + tokens, channels))
    launch(
        "merge_tokens",
        x,
        dtype(x),
        dtype(x if position is None else position),
        (batch, height, width, channels),
        _view(base),
        _view(skip),
        address(position),
        _view(condition),
        count,
        address(x),
    )
    return x


def merge_tokens_backward(
    grad: Tensor, position: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = grad.shape
    grad = contiguous_samples(grad)
    grad_base = grad.new_empty((batch, tokens // 4, 4 * channels))
    grad_position = None if position is None else empty_like(position)
    launch(
        "merge_tokens_backward",
        grad,
        dtype(grad),
        dtype(grad if position is None else position),
        (batch, height, width, channels),
        _view(grad),
        address(grad_base),
        address(grad_position),
    )
    return grad_base, grad.new_empty(0) if grad_position is None else grad_position


def _view(tokens: Tensor | None) -> tuple[int, int] | None:
    """Return tokens (B, N, D) as an msf::TokensView."""
    return None if tokens is None else (address(tokens), tokens.stride(0))
