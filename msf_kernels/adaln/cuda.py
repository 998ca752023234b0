"""Calls of the CUDA kernels in csrc/kernels/adaln.cu and adaln_backward.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cuda_support.launch import DTYPES, address, dtype, launch
from ..dtypes import compute_dtype
from ..grid import TARGET_BLOCKS
from ..layout import contiguous

# The fewest tokens of a slice: 4 in forward, which are one to four steps of its block, and 16 in
# backward, where each slice costs the traffic of two tokens for its partial sums.
MIN_FORWARD_TOKENS, MIN_BACKWARD_TOKENS = 4, 16

MAX_CHANNELS, MAX_SCALAR_CHANNELS = 8192, 2048


def unsupported_reason(
    x: Tensor | None = None, x_out: Tensor | None = None, grad: Tensor | None = None
) -> str | None:
    """Return why a block cannot hold a row, None where it can.

    Every operator has one of x, x_out and grad, which are alike.
    """
    rows = x if x is not None else x_out if x_out is not None else grad
    assert rows is not None
    channels = rows.shape[2]
    vectors = channels * rows.element_size() % 16 == 0 and rows.dtype != torch.float64
    if channels <= (MAX_CHANNELS if vectors else MAX_SCALAR_CHANNELS):
        return None
    return (
        f"D is at most {MAX_CHANNELS}, or {MAX_SCALAR_CHANNELS} where a row is no multiple of 16 "
        f"bytes or in float64, got {channels}"
    )


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, eager: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _, h, mean, rstd = _forward(x, None, None, shift, scale, eps, eager)
    return h, mean, rstd


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, eager: bool) -> Tensor:
    return _forward(x, y, gate, None, None, 0.0, eager)[0]


def gate_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, eager: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, y, gate, shift, scale, eps, eager)


def adaln_modulate_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, ...]:
    return _backward(grad, None, x, None, None, shift, scale, mean, rstd)


def gate_residual_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    return _backward(None, grad, None, y, gate, None, None, None, None)


def gate_residual_adaln_backward(
    grad_h: Tensor,
    grad_x_out: Tensor | None,
    x_out: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, ...]:
    return _backward(grad_h, grad_x_out, x_out, y, gate, shift, scale, mean, rstd)


def _forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    eager: bool,
) -> Any:
    """Return x_out if there is a gate; h, mean and rstd if there is a scale; None for others."""
    x, y = contiguous(x, 16), contiguous(y, 16)
    kind = _modulation_dtype(x, y, gate, shift, scale)
    gate, shift, scale = (_modulation(tensor, kind) for tensor in (gate, shift, scale))
    x_out = None if y is None else x.new_empty(x.shape)
    h = mean = rstd = None
    if scale is not None:
        h = x.new_empty(x.shape)
        mean, rstd = (x.new_empty(x.shape[:2], dtype=compute_dtype(x)) for _ in range(2))
    launch(
        "gate_residual_adaln",
        x,
        _types(x, y, kind),
        _size(x, MIN_FORWARD_TOKENS),
        address(x),
        address(y),
        _address_and_stride(gate),
        _address_and_stride(shift),
        _address_and_stride(scale),
        eps,
        eager,
        address(x_out),
        address(h),
        address(mean),
        address(rstd),
    )
    return x_out, h, mean, rstd


def _backward(
    grad_h: Tensor | None,
    grad_x_out: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, y, gate, shift and scale, of those that are there."""
    tensors = grad_h, grad_x_out, x, y, mean, rstd
    grad_h, grad_x_out, x, y, mean, rstd = (contiguous(t, 16) for t in tensors)
    like = grad_x_out if x is None else x
    assert like is not None
    modulations = gate, shift, scale
    kind = _modulation_dtype(like, y, *modulations)
    gate, scale = _modulation(gate, kind), _modulation(scale, kind)
    grad_x = None if x is None else x.new_empty(x.shape)
    grad_y = None if y is None else y.new_empty(y.shape)
    fresh = torch.empty if like.numel() else torch.zeros
    sums = [None if m is None else fresh(m.shape, dtype=kind, device=m.device) for m in modulations]
    size = batch, tokens, channels, length = _size(like, MIN_BACKWARD_TOKENS)
    slices = -(-tokens // length)
    shared = [m is not None and m.shape[0] != batch for m in modulations]
    partials = None
    if slices > 1 or any(shared):
        partials = like.new_empty((3, batch * slices, channels), dtype=compute_dtype(like))
    launch(
        "gate_residual_adaln_backward",
        like,
        _types(like, y, kind),
        size,
        address(grad_h),
        address(grad_x_out),
        address(x),
        address(y),
        _address_and_stride(gate),
        _address_and_stride(scale),
        address(mean),
        address(rstd),
        address(grad_x),
        address(grad_y),
        *zip(map(address, sums), shared),
        address(partials),
    )
    grads = [g.to(m.dtype) for g, m in zip(sums, modulations) if g is not None and m is not None]
    return *(grad for grad in (grad_x, grad_y) if grad is not None), *grads


def _size(x: Tensor, min_tokens: int) -> tuple[int, int, int, int]:
    """Return TokenSlices: about TARGET_BLOCKS of them, if each has at least `min_tokens` tokens."""
    batch, tokens, channels = x.shape
    slices = max(1, min(-(-TARGET_BLOCKS // max(1, batch)), tokens // min_tokens))
    return batch, tokens, channels, max(1, -(-tokens // slices))


def _types(x: Tensor, y: Tensor | None, modulation: torch.dtype) -> tuple[int, int, int]:
    return dtype(x), dtype(x if y is None else y), DTYPES[modulation]


def _modulation_dtype(x: Tensor, *others: Tensor | None) -> torch.dtype:
    """Return the dtype that kernels take shift, scale and gate in: x's if all are of it."""
    alike = all(other is None or other.dtype == x.dtype for other in others)
    return x.dtype if alike else compute_dtype(x)


def _modulation(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return x (B, D) in the dtype. Copy it if its rows could not be read, or not as vectors."""
    if x is None:
        return None
    x = x.to(dtype)
    address, stride = _address_and_stride(x)
    size = x.element_size()
    aligned = address % 16 == 0 and stride * size % 16 == 0
    if x.stride(1) != 1 or (not aligned and x.shape[1] * size % 16 == 0):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _address_and_stride(x: Tensor | None) -> tuple[int, int]:
    """Return x as a Modulation of csrc/launchers.hpp."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0) if x.shape[0] > 1 else 0)
