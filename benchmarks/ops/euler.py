"""Benchmarks of the sampler's steps on a float32 state, as the sampler keeps it.

No backward is measured, because sampling asks for no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from msf_kernels.euler.examples import EXAMPLES

from ..registry import Benchmark


def step(x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: Tensor, dt: Tensor) -> Tensor:
    v_cond, v_uncond = v_cond.float(), v_uncond.float()  # bfloat16 would round the guidance thrice
    return x + dt * (v_uncond + scale * (v_cond - v_uncond))


def unpatchify(tokens: Tensor, like: Tensor, patch: int) -> Tensor:
    batch, channels, height, width = like.shape
    patches = tokens.view(batch, height // patch, width // patch, patch, patch, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(like.shape)


def step_tokens(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: Tensor, dt: Tensor, patch: int
) -> Tensor:
    return step(x, unpatchify(v_cond, x, patch), unpatchify(v_uncond, x, patch), scale, dt)


def step_and_merge(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor,
    scale: Tensor,
    dt: Tensor,
    base: Tensor,
    patch: int,
) -> Tensor:
    residual = step_tokens(x, v_cond, v_uncond, scale, dt, patch)
    return F.interpolate(base, scale_factor=2) + residual


def step_bytes(x: Tensor, *others: Tensor, patch: int = 0) -> int:
    """Return the bytes moved: all inputs are read once, and the result is of x's size."""
    return 2 * x.nbytes + sum(other.nbytes for other in others)


def benchmarks() -> Iterator[Benchmark]:
    examples = {example.name: example for example in EXAMPLES}
    for name, eager, terms in (
        ("guided_euler_step", step, 3),
        ("guided_euler_step tokens", step_tokens, 3),
        ("guided_euler_merge tokens", step_and_merge, 4),
    ):
        yield Benchmark(examples[name], eager, step_bytes, terms=terms)


BENCHMARKS = list(benchmarks())
