"""Benchmarks of pyramid_split and pyramid_merge with a scale's statistics, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from msf_kernels.pyramid.examples import EXAMPLES

from ..registry import Benchmark


def upsample(x: Tensor, mode: str) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode=mode)


def split(x: Tensor, mean: Tensor, std: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    base = F.avg_pool2d(x, 2)
    residual = x.float() - upsample(base, mode) - mean[:, None, None]
    return base, (residual / std[:, None, None]).to(x.dtype)


def merge(base: Tensor, residual: Tensor, mean: Tensor, std: Tensor, mode: str) -> Tensor:
    detail = residual * std[:, None, None] + mean[:, None, None]
    return (upsample(base, mode) + detail).to(residual.dtype)


def benchmarks() -> Iterator[Benchmark]:
    examples = {example.name: example for example in EXAMPLES}
    # On a GPU the gradient of bilinear upsampling is 16 atomic additions in the tensor's dtype.
    for mode, additions in (("nearest", 1), ("bilinear", 16)):
        forward = Benchmark(
            example=examples[f"pyramid_split {mode}"],
            eager=split,
            # x and the residual are of one size, the base is a quarter.
            bytes=lambda x, mean, std, mode: 9 * x.nbytes // 4 + mean.nbytes + std.nbytes,
            terms=4,
        )
        yield forward
        yield replace(
            forward,
            gradients=forward.example.gradients,
            bytes=lambda x, mean, std, mode: 9 * x.nbytes // 4 + std.nbytes,
            terms=16,
            roundings=4 + additions,
        )
        forward = Benchmark(
            example=examples[f"pyramid_merge {mode}"],
            eager=merge,
            bytes=lambda base, residual, mean, std, mode: (
                base.nbytes + 2 * residual.nbytes + mean.nbytes + std.nbytes
            ),
            terms=4,
        )
        yield forward
        yield replace(
            forward,
            gradients=forward.example.gradients,
            bytes=lambda base, residual, mean, std, mode: (
                base.nbytes + 2 * residual.nbytes + std.nbytes
            ),
            terms=16,
            roundings=additions,
        )


BENCHMARKS = list(benchmarks())
