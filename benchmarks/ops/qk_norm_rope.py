"""Benchmarks of qk_norm_rope before another library's attention, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from msf_kernels.examples import Shape
from msf_kernels.qk_norm_rope.examples import EXAMPLES

from ..registry import Benchmark

EPS = 1e-6

# (B, N, H, d). The tokens are those of latents of 256 and 512 pixels and of MPDiT's coarse scale,
# the heads those of S and XL. The second shape moves 600 MB in bfloat16.
SHAPES: tuple[Shape, ...] = (
    (64, 256, 16, 72),
    (256, 256, 16, 72),
    (64, 80, 16, 72),
    (16, 1024, 16, 72),
    (64, 256, 6, 64),
    (1, 256, 6, 64),
)


def norm_and_rotate(x: Tensor, weight: Tensor, rope: Tensor) -> Tensor:
    """Return q or k (B, N, H, d) normed and rotated in float32, rounded once."""
    first, second = F.rms_norm(x.float(), (len(weight),), weight.float(), EPS).chunk(2, -1)
    cos, sin = rope[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def eager(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, *, num_heads: int
) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return norm_and_rotate(q, q_weight, rope), norm_and_rotate(k, k_weight, rope)


def parameters(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


FORWARD = Benchmark(
    example=EXAMPLES[0],
    eager=eager,
    bytes=lambda qkv, *rest, num_heads: 4 * qkv.nbytes // 3 + parameters(*rest),  # v is not read
    terms=128,
    shapes=SHAPES,
)
# The gradients of q and k, and q and k themselves, are read; all of qkv's is written, v's as zeros.
BACKWARD = replace(
    FORWARD,
    gradients=FORWARD.example.gradients,
    bytes=lambda qkv, q_weight, k_weight, rope, num_heads: (
        7 * qkv.nbytes // 3 + 2 * parameters(q_weight, k_weight) + rope.nbytes
    ),
    # A weight's gradient sums up to 2^20 heads, but in parts of which none is longer than this.
    terms=256,
)
BENCHMARKS = [FORWARD, BACKWARD]
