"""Calls the CUDA kernels of csrc/kernels/interpolation.cu."""

from __future__ import annotations

from torch import Tensor

from ..cuda_support.launch import address, dtype, launch, wide
from ..layout import empty, in_layout_of


def flow_interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    data, noise = in_layout_of(data, data), in_layout_of(noise, data)
    x_t, velocity = empty(data), empty(data)
    time = wide(t, data)
    tensors = map(address, (data, noise, time, x_t, velocity))
    batch = len(data)
    size = data.numel() // max(1, batch)
    launch("flow_interpolate", data, dtype(data), batch, size, *tensors)
    return x_t, velocity
