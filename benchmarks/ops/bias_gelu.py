"""Benchmarks of the bias and GELU between the products of an MLP, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from msf_kernels.bias_gelu.examples import EXAMPLES
from msf_kernels.examples import Shape

from ..registry import Benchmark, in_one_dtype

# (B, N, D) where D is 4 times the width of DiT-XL, L, B or S, at the tokens of 256 and 512 pixels
# and of the base. The first moves 302 MB in bfloat16, 5 times the L2 of an H200.
SHAPES: tuple[Shape, ...] = (
    (64, 256, 4608),
    (64, 64, 4608),
    (16, 1024, 4608),
    (64, 256, 4096),
    (64, 256, 3072),
    (64, 256, 1536),
    (1, 256, 4608),
    (1, 64, 1536),
)


def eager(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x + bias, approximate=approximate)


def benchmarks() -> Iterator[Benchmark]:
    for example in EXAMPLES:
        if "without bias" in example.variant:
            continue
        forward = Benchmark(
            example=in_one_dtype(example),
            eager=eager,
            bytes=lambda x, bias, approximate: 2 * x.nbytes + bias.nbytes,
            terms=16,
            roundings=2,
            shapes=SHAPES,
        )
        yield forward
        # Eager rounds x + bias and the gradient; the bias' gradient sums the rounded ones.
        yield replace(
            forward,
            gradients=example.gradients,
            bytes=lambda x, bias, approximate: 3 * x.nbytes + 2 * bias.nbytes,
            terms=256,
            roundings=3,
        )


BENCHMARKS = list(benchmarks())
