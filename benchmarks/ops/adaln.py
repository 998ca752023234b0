"""adaLN and the gated residual of a DiT block, forward and backward, in both roundings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import msf_kernels

from .. import cudnn_adaln
from ..arms import Arm, compiled, needs_gpu, peer
from ..registry import Benchmark, Shape, normal

EPS = 1e-6
TERMS = 256  # that anyone adds up one after the other; longer sums are sums of sums

# (B, N, D): widths S, B, XL of DiT and 1536; tokens of 256 and 512 pixels at patches of 2 and more,
# with and without class tokens; some 4k, 16k and 64k tokens, and one image. First comes XL at 256
# pixels in training, its base and one image, as in sampling.
SHAPES: tuple[Shape, ...] = (
    (64, 256, 1152),
    (64, 64, 1152),
    (1, 80, 1152),
    (256, 256, 1152),
    (16, 256, 1152),
    (204, 80, 1152),
    (60, 272, 1152),
    (64, 1024, 1152),
    (1, 4096, 1152),
    (64, 256, 1536),
    (64, 256, 768),
    (64, 256, 384),
    (16, 4096, 1536),
    (16, 1024, 768),
    (256, 256, 384),
    (1, 256, 768),
    (1, 64, 384),
)


def inputs(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator, tokens: int, modulations: int
) -> tuple[Tensor, ...]:
    """Tokens, and of the modulation strided views, as a block chunks them."""
    batch, _, channels = shape
    views = normal((batch, 6 * channels), dtype, generator).chunk(6, 1)
    return *(normal(shape, dtype, generator) for _ in range(tokens)), *views[:modulations]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def pair(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x_out = gate_residual(x, y, gate)
    return x_out, modulate(x_out, shift, scale)


def without_mix_order(eager: Callable[..., Any]) -> Arm:
    """Mix-order reduction is what gets gradients of modulations wrong (pytorch/pytorch#193061)."""
    options = {"triton.mix_order_reduction": False}
    return peer("compile-no-mix", compiled(eager, **options))


CUDNN = peer("cudnn-frontend", cudnn_adaln.modulate, partial(needs_gpu, package="cudnn"))


def statistics(x: Tensor) -> int:
    """Bytes of mean and rstd."""
    return 2 * 4 * x.shape[0] * x.shape[1]


def both_directions(
    forward: Benchmark, gradients: int, bytes: Callable[..., int]
) -> list[Benchmark]:
    """The forward in both roundings, and the backward, which is the same in both."""
    forward = replace(forward, peers=(without_mix_order(forward.eager), *forward.peers))
    as_eager = replace(
        forward,
        variant="eager rounding",
        ours=partial(forward.ours, rounding="eager"),
        own_roundings=forward.roundings,
    )
    backward = replace(forward, gradients=gradients, bytes=bytes, terms=TERMS)
    return [forward, as_eager, backward]


BENCHMARKS = [
    *both_directions(
        Benchmark(
            op="adaln_modulate",
            inputs=partial(inputs, tokens=1, modulations=2),
            ours=msf_kernels.adaln_modulate,
            eager=modulate,
            peers=(CUDNN,),
            bytes=lambda x, shift, scale: 2 * x.nbytes + 2 * scale.nbytes,
            terms=TERMS,
            roundings=4,
            shapes=SHAPES,
        ),
        gradients=3,
        bytes=lambda x, shift, scale: 3 * x.nbytes + 3 * scale.nbytes + statistics(x),
    ),
    *both_directions(
        Benchmark(
            op="gate_residual",
            inputs=partial(inputs, tokens=2, modulations=1),
            ours=msf_kernels.gate_residual,
            eager=gate_residual,
            bytes=lambda x, y, gate: 3 * x.nbytes + gate.nbytes,
            roundings=2,
            shapes=SHAPES,
        ),
        gradients=3,
        bytes=lambda x, y, gate: 3 * x.nbytes + 2 * gate.nbytes,
    ),
    *both_directions(
        Benchmark(
            op="gate_residual_adaln",
            inputs=partial(inputs, tokens=2, modulations=3),
            ours=msf_kernels.gate_residual_adaln,
            eager=pair,
            bytes=lambda x, y, gate, shift, scale: 4 * x.nbytes + 3 * gate.nbytes,
            terms=TERMS,
            roundings=6,
            own_roundings=2,  # the norm starts from x_out as rounded
            shapes=SHAPES,
        ),
        gradients=5,
        bytes=lambda x, y, gate, shift, scale: 6 * x.nbytes + 5 * gate.nbytes + statistics(x),
    ),
]
