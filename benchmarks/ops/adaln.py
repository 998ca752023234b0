"""Benchmarks of a DiT block's adaLN and gated residual, forward and backward, in both roundings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msf_kernels.adaln.examples import EXAMPLES
from msf_kernels.examples import Shape

from .. import cudnn_adaln
from ..arms import Arm, compiled, needs_gpu, peer
from ..registry import Benchmark, in_one_dtype

EPS = 1e-6
TERMS = 256  # the most that an arm adds up one by one; longer sums are sums of sums

# (B, N, D). D is the width of DiT-S, B or XL, or 1536. N is the tokens of 256 or 512 pixels at
# patches of 2 and more, with or without class tokens. B * N is some 4k, 16k or 64k, or B is 1.
# First come XL at 256 pixels in training, its base, and one image, as in sampling.
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


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, y_bias: Tensor | None = None) -> Tensor:
    return x + gate[:, None] * (y if y_bias is None else y + y_bias)


def pair(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    y_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    x_out = gate_residual(x, y, gate, y_bias)
    return x_out, modulate(x_out, shift, scale)


def without_mix_order(eager: Callable[..., Any]) -> Arm:
    """Return the arm of torch.compile without mix-order reduction.

    That reduction gets gradients of modulations wrong (pytorch/pytorch#193061).
    """
    options = {"triton.mix_order_reduction": False}
    return peer("compile-no-mix", compiled(eager, **options), _has_no_mix_order)


def _has_no_mix_order(device: torch.device) -> str | None:
    """Return why this torch needs no arm without that reduction, None where it does."""
    from torch._inductor import config

    known = hasattr(config.triton, "mix_order_reduction")
    return None if known else f"torch {torch.__version__} has no mix-order reduction"


CUDNN = peer("cudnn-frontend", cudnn_adaln.modulate, partial(needs_gpu, package="cudnn"))


def statistics(x: Tensor) -> int:
    """Return the bytes of mean and rstd."""
    return 2 * 4 * x.shape[0] * x.shape[1]


def nbytes(bias: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in bias)


def benchmarks(
    op: str,
    eager: Callable[..., Any],
    forward_bytes: Callable[..., int],
    backward_bytes: Callable[..., int],
    roundings: int,
    own_roundings: int = 1,
    peers: tuple[Arm, ...] = (),
    terms: int = TERMS,
) -> Iterator[Benchmark]:
    """Yield the forward in both roundings, and the backward, which is the same in both.

    Then forward and backward with a bias, where there may be one.
    """
    examples = {example.name: example for example in EXAMPLES}
    forward = Benchmark(
        example=examples[op],
        eager=eager,
        peers=(without_mix_order(eager), *peers),
        bytes=forward_bytes,
        terms=terms,
        roundings=roundings,
        own_roundings=own_roundings,
        shapes=SHAPES,
    )
    yield forward
    yield replace(forward, example=examples[f"{op} eager rounding"], own_roundings=roundings)
    backward = replace(forward, bytes=backward_bytes, terms=TERMS)
    yield replace(backward, gradients=forward.example.gradients)
    if example := examples.get(f"{op} bias"):
        # Eager rounds y + y_bias too, and its gradient, of which that of the bias is the sum.
        example = in_one_dtype(example)
        forward, backward = (
            replace(one, example=example, roundings=roundings + 1, shapes=SHAPES[:4])
            for one in (forward, backward)
        )
        yield forward
        yield replace(backward, gradients=example.gradients)


BENCHMARKS = [
    *benchmarks(
        "adaln_modulate",
        modulate,
        lambda x, shift, scale: 2 * x.nbytes + 2 * scale.nbytes,
        lambda x, shift, scale: 3 * x.nbytes + 3 * scale.nbytes + statistics(x),
        roundings=4,
        peers=(CUDNN,),
    ),
    *benchmarks(
        "gate_residual",
        gate_residual,
        lambda x, y, gate, *bias: 3 * x.nbytes + gate.nbytes + nbytes(bias),
        lambda x, y, gate, *bias: 3 * x.nbytes + 2 * gate.nbytes + 2 * nbytes(bias),
        roundings=2,
        terms=1,
    ),
    *benchmarks(
        "gate_residual_adaln",
        pair,
        lambda x, y, gate, shift, scale, *bias: 4 * x.nbytes + 3 * gate.nbytes + nbytes(bias),
        lambda x, y, gate, shift, scale, *bias: (
            6 * x.nbytes + 5 * gate.nbytes + statistics(x) + 2 * nbytes(bias)
        ),
        roundings=6,
        own_roundings=2,  # the norm starts from x_out as rounded
    ),
]
