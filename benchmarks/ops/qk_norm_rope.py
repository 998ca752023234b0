"""qk_norm_rope before an attention that is another's, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

import msf_kernels

from ..registry import Benchmark, Shape, normal

EPS = 1e-6

# (B, N, H, d). Tokens of 256 and 512 pixel latents and of MPDiT's coarse scale, heads of S and XL;
# the second moves 600 MB in bfloat16.
SHAPES: tuple[Shape, ...] = (
    (64, 256, 16, 72),
    (256, 256, 16, 72),
    (64, 80, 16, 72),
    (16, 1024, 16, 72),
    (64, 256, 6, 64),
    (1, 256, 6, 64),
)


def inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    batch, tokens, heads, head_dim = shape
    qkv = normal((batch, tokens, 3 * heads * head_dim), dtype, generator)
    weights = 1 + 0.1 * normal((2, head_dim), torch.float32, generator)
    angles = 3 * normal((tokens, head_dim // 2), torch.float32, generator)
    return qkv, *weights, torch.stack((angles.cos(), angles.sin()))


def heads_of(qkv: Tensor, weight: Tensor) -> int:
    return qkv.shape[-1] // (3 * len(weight))


def prepare(x: Tensor, weight: Tensor, rope: Tensor) -> Tensor:
    """q or k (B, N, H, d) in float32, rounded once."""
    first, second = F.rms_norm(x.float(), (len(weight),), weight.float(), EPS).chunk(2, -1)
    cos, sin = rope[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def eager(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.unflatten(-1, (3, heads_of(qkv, q_weight), -1)).unbind(2)
    return prepare(q, q_weight, rope), prepare(k, k_weight, rope)


def ours(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    return msf_kernels.qk_norm_rope(
        qkv,
        num_heads=heads_of(qkv, q_weight),
        q_weight=q_weight,
        k_weight=k_weight,
        rope=rope.float(),  # the gate widens every argument; the numbers are the same
        eps=EPS,
    )


def parameters(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


FORWARD = Benchmark(
    op="qk_norm_rope",
    inputs=inputs,
    ours=ours,
    eager=eager,
    bytes=lambda qkv, *rest: 4 * qkv.nbytes // 3 + parameters(*rest),  # v is not read
    terms=128,
    shapes=SHAPES,
)
# The gradients of q and k, and q and k themselves, are read; all of qkv's is written, v's as zeros.
BACKWARD = replace(
    FORWARD,
    gradients=3,
    bytes=lambda qkv, q_weight, k_weight, rope: (
        7 * qkv.nbytes // 3 + 2 * parameters(q_weight, k_weight) + rope.nbytes
    ),
    # A weight's gradient sums up to 2^20 heads, but in parts of which none is longer than this.
    terms=256,
)
BENCHMARKS = [FORWARD, BACKWARD]
