"""Calls of the CUDA kernels in csrc/kernels/adaln.cu and adaln_backward.cu."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..cuda_support.launch import DTYPES, address, dtype, launch, parameter
from ..dtypes import compute_dtype
from ..grid import SMS
from ..layout import contiguous, empty_like, new_gradient

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
    x: Tensor, *modulation: Any, for_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    return gate_residual_adaln(x, None, None, None, *modulation, for_gradient=for_gradient)[1:]


def gate_residual(
    x: Tensor, y: Tensor, y_bias: Tensor | None, gate: Tensor, rounding: str
) -> Tensor:
    return gate_residual_adaln(x, y, y_bias, gate, None, None, 0.0, rounding)[0]


def adaln_modulate_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, statistics: Tensor, norm: str
) -> tuple[Tensor, ...]:
    modulations = None, shift, scale
    grads = gate_residual_adaln_backward(grad, None, x, None, None, *modulations, statistics, norm)
    return grads[0], *grads[-2:]


def gate_residual_backward(
    grad: Tensor, y: Tensor, y_bias: Tensor | None, gate: Tensor
) -> tuple[Tensor, ...]:
    return gate_residual_adaln_backward(None, grad, None, y, y_bias, gate, None, None, None)[1:4]


def gate_residual_adaln(
    x: Tensor,
    y: Tensor | None,
    y_bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rounding: str,
    norm: str = "layer",
    *,
    for_gradient: bool = True,
) -> Any:
    """Return x_out if there is a gate; h and, for a gradient, statistics if there is a scale; None
    for others."""
    x, y, y_bias = contiguous(x, 16), contiguous(y, 16), contiguous(y_bias, 16)
    kind = _modulation_dtype(x, y, gate, shift, scale)
    gate, shift, scale = (_modulation(tensor, kind) for tensor in (gate, shift, scale))
    x_out = None if y is None else empty_like(x)
    h = statistics = None
    if scale is not None:
        h = empty_like(x)
        if for_gradient:
            statistics = x.new_empty((2, *x.shape[:2]), dtype=compute_dtype(x))
    launch(
        "gate_residual_adaln",
        x,
        _types(x, y, kind),
        _size(x, _forward_slices(*x.shape[:2])),
        address(x),
        address(y),
        parameter(y_bias),
        _address_and_stride(gate),
        _address_and_stride(shift),
        _address_and_stride(scale),
        eps,
        rounding == "eager",
        norm == "rms",
        address(x_out),
        address(h),
        *_addresses(statistics),
    )
    return x_out, h, statistics


def gate_residual_adaln_backward(
    grad_h: Tensor | None,
    grad_x_out: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    y_bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    statistics: Tensor | None,
    norm: str = "layer",
) -> tuple[Any, ...]:
    """Return the gradients of x, y, y_bias, gate, shift and scale; None for what is not there.

    That of an absent y_bias is empty. x_out is called x here.
    """
    tensors = grad_h, grad_x_out, x, y, y_bias
    grad_h, grad_x_out, x, y, y_bias = (contiguous(t, 16) for t in tensors)
    statistics = contiguous(statistics)
    like = grad_x_out if x is None else x
    assert like is not None
    modulations = gate, shift, scale
    kind = _modulation_dtype(like, y, *modulations)
    gate, scale = _modulation(gate, kind), _modulation(scale, kind)
    grad_x = None if x is None else empty_like(x)
    grad_y = None if y is None else empty_like(y)
    grad_bias = new_gradient(y_bias, like)
    sums: list[Any] = [None if m is None else m.new_empty(m.shape, dtype=kind) for m in modulations]
    if not like.numel():
        for total in grad_bias, *sums:
            total is not None and total.zero_()
    batch, tokens, channels = like.shape
    vectors = -(-channels * like.element_size() // 16)
    threads = min(-(-vectors // 32) * 32, 512)
    room = 512 if x is not None else 768  # at 128 registers a thread, and at 80 without the norm
    size = *_, length = _size(like, _backward_slices(batch, tokens, threads, room))
    slices = -(-tokens // length)
    shared = [m is not None and m.shape[0] != batch for m in modulations]
    partials = None
    if slices > 1 or any(shared) or y_bias is not None:
        partials = like.new_empty((4, batch * slices, channels), dtype=compute_dtype(like))
    launch(
        "gate_residual_adaln_backward",
        like,
        _types(like, y, kind),
        size,
        address(grad_h),
        address(grad_x_out),
        address(x),
        address(y),
        parameter(y_bias),
        _address_and_stride(gate),
        _address_and_stride(scale),
        *_addresses(statistics),
        norm == "rms",
        address(grad_x),
        address(grad_y),
        parameter(grad_bias),
        *zip(map(address, sums), shared),
        address(partials),
    )
    grads = (None if m is None else g.to(m.dtype) for g, m in zip(sums, modulations))
    return grad_x, grad_y, grad_bias, *grads


def _forward_slices(batch: int, tokens: int) -> int:
    """Return how many slices of a sample fill the SMs with one-warp teams, 32 on each.

    They have 4 tokens or more, which share the sample's modulation in L1.
    """
    return min(-(-32 * SMS // max(1, batch)), tokens // 4)


@functools.lru_cache
def _backward_slices(batch: int, tokens: int, threads: int, room: int) -> int:
    """Return the fewest slices of a sample whose blocks, in up to four waves, leave no SM idle.

    An SM has room for so many threads. A slice has 16 tokens or more, because it writes and later
    reads the partial sums of four parameters, as much as 3 tokens.
    """
    at_once, batch = SMS * (room // threads), max(1, batch)

    def busy(slices: int) -> float:
        waves = batch * slices / at_once
        return waves / math.ceil(waves)

    most = min(tokens // 16, 4 * at_once // batch)
    return max(range(1, most + 1), key=busy, default=1)


def _size(x: Tensor, slices: int) -> tuple[int, int, int, int]:
    """Return TokenSlices of about so many slices a sample."""
    batch, tokens, channels = x.shape
    return batch, tokens, channels, max(1, -(-tokens // max(1, slices)))


def _addresses(statistics: Tensor | None) -> tuple[int, int]:
    """Return where mean and rstd begin."""
    return (0, 0) if statistics is None else (address(statistics[0]), address(statistics[1]))


def _types(x: Tensor, y: Tensor | None, modulation: torch.dtype) -> tuple[int, int, int]:
    return dtype(x), dtype(x if y is None else y), DTYPES[modulation]


def _modulation_dtype(x: Tensor, *others: Tensor | None) -> torch.dtype:
    """Return the dtype that kernels take shift, scale and gate in: x's if all are of it."""
    for other in others:
        if other is not None and other.dtype != x.dtype:
            return compute_dtype(x)
    return x.dtype


def _modulation(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return x (B, D) in the dtype. Copy it if its rows could not be read, or not as vectors."""
    if x is None:
        return None
    if x.dtype != dtype:
        x = x.to(dtype)
    address, stride = _address_and_stride(x)
    size = x.element_size()
    aligned = address % 16 == 0 and stride * size % 16 == 0
    if x.stride(1) != 1 or (not aligned and x.shape[1] * size % 16 == 0):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _address_and_stride(x: Tensor | None) -> tuple[int, int]:
    """Return x as a Modulation of csrc/kernels/adaln.hpp."""
    return (0, 0) if x is None else (address(x), x.stride(0) if x.shape[0] > 1 else 0)
