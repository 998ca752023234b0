"""The sampler's steps on a float32 state, as the sampler keeps it.

They have no backward to measure, because sampling asks for no gradient of theirs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import msf_kernels

from ..registry import Benchmark, Shape, normal

PATCH = 2


def step_inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    x = normal(shape, torch.float32, generator)
    v_cond, v_uncond = (normal(shape, dtype, generator) for _ in range(2))
    scale, dt = (torch.tensor(value, device=generator.device) for value in (4.0, 1 / 50))
    return x, v_cond, v_uncond, scale, dt


def step(x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: Tensor, dt: Tensor) -> Tensor:
    v_cond, v_uncond = v_cond.float(), v_uncond.float()  # bfloat16 would round the guidance thrice
    return x + dt * (v_uncond + scale * (v_cond - v_uncond))


def tokens_inputs(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """The velocities as a transformer returns them: (B, H/p * W/p, p * p * C)."""
    x, *velocities, scale, dt = step_inputs(shape, dtype, generator)
    batch, channels, height, width = shape
    tokens = (batch, height * width // PATCH**2, PATCH**2 * channels)
    return x, *(velocity.view(tokens) for velocity in velocities), scale, dt


def unpatchify(tokens: Tensor, like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    patches = tokens.view(batch, height // PATCH, width // PATCH, PATCH, PATCH, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(like.shape)


def step_tokens(x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: Tensor, dt: Tensor) -> Tensor:
    return step(x, unpatchify(v_cond, x), unpatchify(v_uncond, x), scale, dt)


def merge_inputs(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    batch, channels, height, width = shape
    base = normal((batch, channels, height // 2, width // 2), torch.float32, generator)
    return *tokens_inputs(shape, dtype, generator), base


def step_and_merge(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: Tensor, dt: Tensor, base: Tensor
) -> Tensor:
    residual = step_tokens(x, v_cond, v_uncond, scale, dt)
    return F.interpolate(base, scale_factor=2) + residual


def step_bytes(x: Tensor, *others: Tensor) -> int:
    """All inputs are read once, and the result is of x's size."""
    return 2 * x.nbytes + sum(other.nbytes for other in others)


BENCHMARKS = [
    Benchmark(
        op="guided_euler_step",
        inputs=step_inputs,
        ours=msf_kernels.guided_euler_step,
        eager=step,
        bytes=step_bytes,
        terms=3,
    ),
    Benchmark(
        op="guided_euler_step",
        variant="tokens",
        inputs=tokens_inputs,
        ours=partial(msf_kernels.guided_euler_step, patch=PATCH),
        eager=step_tokens,
        bytes=step_bytes,
        terms=3,
    ),
    Benchmark(
        op="guided_euler_merge",
        variant="tokens",
        inputs=merge_inputs,
        ours=partial(msf_kernels.guided_euler_merge, patch=PATCH),
        eager=step_and_merge,
        bytes=step_bytes,
        terms=4,
    ),
]
