"""Calls of the CUDA kernels in csrc/kernels/interpolation.cu."""

from __future__ import annotations

from torch import Tensor

from ..cuda_support.launch import address, dtype, launch, wide
from ..layout import empty, in_layout_of


def flow_interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    data, noise = in_layout_of(data, data), in_layout_of(noise, data)
    x_t, velocity = empty(data), empty(data)
    t_wide = wide(t, data)
    batch = len(data)
    launch(
        "flow_interpolate",
        data,
        dtype(data),
        batch,
        data.numel() // max(1, batch),
        address(data),
        address(noise),
        address(t_wide),
        address(x_t),
        address(velocity),
    )
    return x_t, velocity
