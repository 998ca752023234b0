"""flow_interpolate in Triton, in one pass over memory."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, empty, in_layout_of
from ..triton_support.arithmetic import narrow, widen
from ..triton_support.launch import Elements, launch


@triton.jit
def interpolate_kernel(
    data_ptr,  # (B, size)
    noise_ptr,  # (B, size)
    t_ptr,  # (B,)
    x_t_ptr,  # (B, size)
    velocity_ptr,  # (B, size)
    size,
    BLOCK: tl.constexpr,
):
    """Write x_t and velocity; the ``size`` elements of a sample take a whole number of programs."""
    blocks = tl.cdiv(size, BLOCK)
    sample = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = i < size
    i += sample.to(tl.int64) * size
    t = widen(tl.load(t_ptr + sample))
    data = widen(tl.load(data_ptr + i, mask=exists))
    noise = widen(tl.load(noise_ptr + i, mask=exists))
    dtype = x_t_ptr.dtype.element_ty
    tl.store(x_t_ptr + i, narrow((1 - t) * noise + t * data, dtype), mask=exists)
    tl.store(velocity_ptr + i, narrow(data - noise, dtype), mask=exists)


def flow_interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x_t, velocity = empty(data), empty(data)
    size = math.prod(data.shape[1:])
    elements = Elements.of(size, data.element_size())
    launch(
        interpolate_kernel,
        data.device,
        len(data) * elements.count,
        data_ptr=in_layout_of(data, data),
        noise_ptr=in_layout_of(noise, data),
        t_ptr=contiguous(t),
        x_t_ptr=x_t,
        velocity_ptr=velocity,
        size=size,
        BLOCK=elements.block,
        warps=elements.warps,
    )
    return x_t, velocity
