"""pyramid_split and pyramid_merge with the statistics of a scale, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import msf_kernels

from ..registry import Benchmark, Shape, normal


def upsample(x: Tensor, mode: str) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode=mode)


def statistics(channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """mean and std (C,) in float32, as a model keeps them."""
    mean, std = normal((2, channels), torch.float32, generator)
    return mean, 0.5 + std.abs()


def split_inputs(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    return normal(shape, dtype, generator), *statistics(shape[1], generator)


def split(x: Tensor, mean: Tensor, std: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    base = F.avg_pool2d(x, 2)
    residual = x.float() - upsample(base, mode) - mean[:, None, None]
    return base, (residual / std[:, None, None]).to(x.dtype)


def split_ours(x: Tensor, mean: Tensor, std: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    return msf_kernels.pyramid_split(x, mode=mode, mean=mean, std=std)


def merge_inputs(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    batch, channels, height, width = shape
    base = normal((batch, channels, height // 2, width // 2), dtype, generator)
    return base, normal(shape, dtype, generator), *statistics(channels, generator)


def merge(base: Tensor, residual: Tensor, mean: Tensor, std: Tensor, mode: str) -> Tensor:
    detail = residual * std[:, None, None] + mean[:, None, None]
    return (upsample(base, mode) + detail).to(residual.dtype)


def merge_ours(base: Tensor, residual: Tensor, mean: Tensor, std: Tensor, mode: str) -> Tensor:
    return msf_kernels.pyramid_merge(base, residual, mode=mode, mean=mean, std=std)


def benchmarks() -> Iterator[Benchmark]:
    # On a GPU the gradient of bilinear upsampling is 16 atomic additions in the tensor's dtype.
    for mode, additions in (("nearest", 1), ("bilinear", 16)):
        forward = Benchmark(
            op="pyramid_split",
            variant=mode,
            inputs=split_inputs,
            ours=partial(split_ours, mode=mode),
            eager=partial(split, mode=mode),
            # x and the residual are of one size, the base is a quarter.
            bytes=lambda x, mean, std: 2 * x.nbytes + x.nbytes // 4 + mean.nbytes + std.nbytes,
            terms=4,
        )
        yield forward
        yield replace(
            forward,
            gradients=1,
            bytes=lambda x, mean, std: 2 * x.nbytes + x.nbytes // 4 + std.nbytes,
            terms=16,
            roundings=4 + additions,
        )
        forward = Benchmark(
            op="pyramid_merge",
            variant=mode,
            inputs=merge_inputs,
            ours=partial(merge_ours, mode=mode),
            eager=partial(merge, mode=mode),
            bytes=lambda base, residual, mean, std: (
                base.nbytes + 2 * residual.nbytes + mean.nbytes + std.nbytes
            ),
            terms=4,
        )
        yield forward
        yield replace(
            forward,
            gradients=2,
            bytes=lambda base, residual, mean, std: base.nbytes + 2 * residual.nbytes + std.nbytes,
            terms=16,
            roundings=additions,
        )


BENCHMARKS = list(benchmarks())
