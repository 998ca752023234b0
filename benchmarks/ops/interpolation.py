"""The benchmark of flow_interpolate, without backward: training asks for no gradient of it."""

from __future__ import annotations

from torch import Tensor

from msf_kernels.interpolation.examples import EXAMPLES

from ..registry import Benchmark


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.view(-1, *[1] * (data.dim() - 1))
    return ((1 - t) * noise + t * data).to(data.dtype), data - noise


BENCHMARKS = [
    Benchmark(
        example=EXAMPLES[0],
        eager=interpolate,
        bytes=lambda data, noise, t: 3 * data.nbytes + noise.nbytes + t.nbytes,
        terms=2,
    ),
]
