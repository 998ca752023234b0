"""flow_interpolate in Triton, in one pass over memory."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, empty, in_layout_of
from ..triton_support.arithmetic import narrow, widen
from ..triton_support.image import LAYOUTS
from ..triton_support.launch import Elements, launch


@triton.jit
def interpolate_kernel(data, noise, t, x_t, velocity, size, ELEMENTS: tl.constexpr):
    """The ``size`` elements of a sample take a whole number of programs."""
    blocks = tl.cdiv(size, ELEMENTS)
    sample = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    exists = i < size
    i += sample.to(tl.int64) * size
    time = widen(tl.load(t + sample))
    wide, wide_noise = widen(tl.load(data + i, mask=exists)), widen(tl.load(noise + i, mask=exists))
    dtype = x_t.dtype.element_ty
    tl.store(x_t + i, narrow((1 - time) * wide_noise + time * wide, dtype), mask=exists)
    tl.store(velocity + i, narrow(wide - wide_noise, dtype), mask=exists)


def flow_interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x_t, velocity = empty(data), empty(data)
    size = math.prod(data.shape[1:])
    elements = Elements.of(size, data.element_size())
    tensors = in_layout_of(data, data), in_layout_of(noise, data), contiguous(t), x_t, velocity
    programs = len(data) * elements.count
    constants = size, elements.block
    launch(interpolate_kernel, data.device, programs, *tensors, *constants, warps=elements.warps)
    return x_t, velocity


# Calls that launch every kernel; new(*shape) makes a tensor. See audit/triton.py.
AUDITED = {
    "interpolate": lambda new: flow_interpolate(new(2, 16, 64, 64), new(2, 16, 64, 64), new(2)),
}
AUDITED_LAYOUTS = LAYOUTS
