"""flow_interpolate. It has no backward to measure, because training asks for no gradient of it."""

from __future__ import annotations

import torch
from torch import Tensor

import msf_kernels

from ..registry import Benchmark, Shape, normal


def interpolate_inputs(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    data, noise = (normal(shape, dtype, generator) for _ in range(2))
    return data, noise, torch.rand(shape[0], generator=generator, device=generator.device)


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.view(-1, *[1] * (data.dim() - 1))
    return ((1 - t) * noise + t * data).to(data.dtype), data - noise


BENCHMARKS = [
    Benchmark(
        op="flow_interpolate",
        inputs=interpolate_inputs,
        ours=msf_kernels.flow_interpolate,
        eager=interpolate,
        bytes=lambda data, noise, t: 3 * data.nbytes + noise.nbytes + t.nbytes,
        terms=2,
    ),
]
