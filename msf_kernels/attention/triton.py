"""Attention in Triton straight from packed qkv, with norm and rotation inside.

A program owns a tile of a head's tokens and goes through the others in chunks: 272 = 4 * 64 + 16,
the last padded to a multiple of 16. Of so few keys it keeps all scores in registers, so that there
is one maximum; compiled for sm_90, which has room for those of 272 keys, that is a fifth fewer
instructions than online softmax, which takes over above. A tile has 128 queries: with 64 as many
keys would be normed and turned for half the scores, a third more instructions at N = 256, d = 64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from ..dtypes import compute_dtype
from ..layout import aligned, contiguous
from ..triton_support import interpreted
from ..triton_support.launch import WGMMA_UNSUPPORTED_REASON, launch, power_of_2
from .triton_backward import backward_kernel, head_backward_kernel
from .triton_forward import forward_kernel
from .triton_heads import Tokens


@dataclass(frozen=True)
class Tile:
    """A program's own tokens (rows), those of a step (columns) and those after all steps (rest, in
    chunks of which the last may reach beyond the last token), and the pieces of a head.

    alone: a program of the backward has the tokens of a whole head, and no steps.
    """

    alone: bool
    rows: int
    columns: int
    steps: int
    rest: tuple[tuple[int, int], ...]
    masked: bool
    warps: int
    stages: int
    dim: int
    pieces: tuple[tuple[int, int, bool], ...]

    @classmethod
    @functools.cache
    def of(cls, tokens: int, dim: int, element_size: int, backward: bool, wgmma: bool) -> Tile:
        """As large as the audit finds no spills at.

        With wgmma, operands stay in shared memory. Else those of a step are copied to registers,
        and joined halves without ldmatrix. Products of float32 are none for tensor cores.
        """
        alone = backward and wgmma and element_size == 2 and fits_alone(tokens, dim)
        rows, columns, stages = 128, 64, 2
        if backward:
            rows = 128 if wgmma and (alone or dim <= 72) else 64
            columns, stages = (32, 3) if wgmma else (16, 1)
        elif dim > 96 or (tokens <= 64 and not wgmma):
            columns = 32
        if element_size > 2:
            rows = columns = 128 // element_size
        rows = min(rows, max(16, power_of_2(tokens)))
        columns = min(columns, max(16, power_of_2(tokens + 1) // 2))
        once = max_keys_at_once(dim, wgmma) if not backward and element_size == 2 else 0
        steps = tokens // columns if tokens > once else 0
        rest, masked = chunks(tokens - steps * columns, columns), tokens % 16 > 0
        # Alone, joined halves of more than 64 channels and their tail spill some 200 bytes.
        joined = (wgmma and not (alone and dim > 64)) or element_size > 2
        cut = pieces(dim, 64 if element_size == 2 else 16, joined)
        max_dim = 64 if wgmma or masked else 72  # channels that four warps and 64 rows do not spill
        tight = backward and not alone and element_size == 2 and dim > max_dim
        warps = 8 if rows == 128 or (rows == 64 and tight) else 4
        return cls(alone, rows, columns, steps, rest, masked, warps, stages, dim, cut)


def max_keys_at_once(dim: int, wgmma: bool) -> int:
    """Keys of which a program of the forward can have all scores in its registers."""
    return (272 if wgmma else 192) - (64 if dim > 80 else 0)


def fits_alone(tokens: int, dim: int) -> bool:
    """Whether a program of the backward can have all gradients of a head in its registers.

    Of more than 64 channels with a mask beyond the last token it would spill some 30 bytes.
    """
    if dim <= 64:
        return tokens <= 128
    return dim <= 80 and tokens <= 64 and tokens % 16 == 0


def chunks(tokens: int, widest: int) -> tuple[tuple[int, int], ...]:
    """(first, width) in powers of two that cover as many tokens, rounded up to 16."""
    cut, first = [], 0
    while first < tokens:
        width = min(widest, power_of_2((tokens - first + 15) // 16 * 16 + 1) // 2)
        cut.append((first, width))
        first += width
    return tuple(cut)


def pieces(dim: int, widest: int, joined: bool) -> tuple[tuple[int, int, bool], ...]:
    """(first, width, joined) in either half of powers of two that cover a head with least waste.

    Halves narrower than a tensor core's 16 are joined in any case.
    """
    half = (dim + 1) // 2
    main = min(widest, max(8, power_of_2(half + 1) // 2))
    count = max(1, half // main)
    rest = max(0, half - count * main)
    tail = max(8, power_of_2(rest)) if rest else 0
    if tail == main < widest:
        return ((0, 2 * main, joined),)
    cut = [(i * main, main, joined or main < 16) for i in range(count)]
    return (*cut, (count * main, tail, joined or tail < 16)) if tail else tuple(cut)


MAX_HEAD_DIM = 128  # of larger ones the tiles would not fit the shared memory of every GPU


def unsupported_reason(qkv: Tensor, num_heads: int) -> str | None:
    """None where the kernels take the arguments of forward or backward, else the reason."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    if interpreted():
        return None
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is at most {MAX_HEAD_DIM}, got {head_dim}"
    if WGMMA_UNSUPPORTED_REASON and has_wgmma(qkv.device):
        return WGMMA_UNSUPPORTED_REASON
    return None


def attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, count, width = qkv.shape
    tile = _tile(qkv, num_heads, backward=False)
    out = qkv.new_empty(batch, count, width // 3)
    logsumexp = qkv.new_empty((batch, num_heads, count), dtype=compute_dtype(qkv))
    programs = batch * num_heads * triton.cdiv(count, tile.rows)
    x = _prepared(qkv, num_heads, q_weight, k_weight, rope, eps)
    _launch(forward_kernel, tile, programs, qkv, x, _tokens(out, num_heads), logsumexp)
    return out, logsumexp


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, width = qkv.shape
    tile = _tile(qkv, num_heads, backward=True)
    grad_qkv = qkv.new_empty(qkv.shape)
    # Of every tile of queries, then of keys, its sum for the gradient of its weight.
    sums = batch * num_heads, 2, triton.cdiv(count, tile.rows), width // (3 * num_heads)
    partials = qkv.new_empty(sums, dtype=compute_dtype(qkv))
    x = _prepared(qkv, num_heads, q_weight, k_weight, rope, eps)
    outputs = _tokens(aligned(out), num_heads), logsumexp.contiguous()
    tensors = _tokens(aligned(grad), num_heads), x, *outputs, _tokens(grad_qkv, num_heads), partials
    if tile.alone:
        _launch(head_backward_kernel, tile, batch * num_heads, qkv, *tensors)
    else:
        _launch(backward_kernel, tile, partials[..., 0].numel(), qkv, *tensors)
    grad_q_weight = _weight_gradient(q_weight, partials[:, 0])
    return grad_qkv, grad_q_weight, _weight_gradient(k_weight, partials[:, 1])


def _weight_gradient(weight: Tensor | None, partials: Tensor) -> Tensor:
    if weight is None:
        return partials.new_empty(0)
    return partials.sum((0, 1)).to(weight.dtype)


def _prepared(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    eps: float,
) -> Tokens:
    """qkv with what its q and k pass on their way into a tile."""
    options = *map(contiguous, (q_weight, k_weight, rope)), tl.constexpr(eps)
    return _tokens(aligned(qkv), num_heads, *options)


def _tokens(x: Tensor, num_heads: int, *prepared: Any) -> Tokens:
    batch, token = x.stride(0) if len(x) > 1 else 0, x.stride(1)
    unit = math.gcd(batch, token, 8)
    strides = batch // unit, token // unit, tl.constexpr(unit)
    return Tokens(x, *strides, x.shape[1], num_heads, *prepared)


def _tile(qkv: Tensor, num_heads: int, backward: bool) -> Tile:
    dim = qkv.shape[2] // (3 * num_heads)
    return Tile.of(qkv.shape[1], dim, qkv.element_size(), backward, has_wgmma(qkv.device))


def has_wgmma(device: torch.device) -> bool:
    """Whether the GPU is of sm_90 to sm_11x. Tensors without memory are for what Triton compiles
    for; for the interpreter, slow at each step, all are.
    """
    if device.type == "cuda":
        return 9 <= torch.cuda.get_device_capability(device)[0] < 12
    return interpreted() or 90 <= driver.active.get_current_target().arch < 120


def _launch(kernel: Any, tile: Tile, programs: int, qkv: Tensor, *tensors: Any) -> None:
    others = () if tile.alone else (tile.columns, tile.steps, tile.rest, tile.masked)
    arguments = *tensors, tile.dim, tile.pieces, tile.rows, *others
    warps, stages = tile.warps, tile.stages
    launch(kernel, qkv.device, programs, *arguments, warps=warps, fused=True, num_stages=stages)


def _audited(kernel: str, tokens: int, dim: int, heads: int = 4) -> Callable[..., Any]:
    def call(new: Callable[..., Tensor]) -> None:
        weight = new(dim, dtype=torch.float32)
        rope = new(2, tokens, dim // 2, dtype=torch.float32)
        args = new(2, tokens, 3 * heads * dim), weight, weight, rope
        out, logsumexp = new(2, tokens, heads * dim), new(2, heads, tokens, dtype=torch.float32)
        if kernel == "forward":
            attention(*args, heads, 1e-6)
        else:
            attention_backward(out, *args, out, logsumexp, heads, 1e-6)

    return call


# Calls that launch every kernel, see audit/triton.py: full chunks, some left over, a mask, the most
# that fits at once or alone; heads of other widths at few of them, as a backward compiles for 10 s.
AUDITED = {
    f"{kernel} {tokens} x {dim}": _audited(kernel, tokens, dim)
    for kernel, numbers, dims in (
        ("forward", (64, 80, 192, 271, 272, 1024), (64, 72)),
        ("forward", (208, 272), (80, 128)),
        ("forward", (64, 80), (48, 96)),  # which ptxas 12.8 gets wrong
        ("backward", (63, 64, 80, 271, 272, 1024), (64, 72)),
        ("backward", (64, 272), (80, 128)),
    )
    for tokens, dim in product(numbers, dims)
}
# Triton compiles other code for one head, and for strides that are no multiple of 16: 216 elements
# from token to token of one head of 72, and 108 of 36, which leave 8 bytes to read at once.
AUDITED |= {
    f"{kernel} {tokens} x {dim}, one head": _audited(kernel, tokens, dim, heads=1)
    for kernel, tokens, dim in (
        ("forward", 272, 72),
        ("forward", 272, 36),
        ("backward", 80, 72),
        ("backward", 80, 96),
        ("backward", 272, 72),
        ("backward", 300, 64),
        ("backward", 64, 36),
        ("backward", 272, 36),
    )
}
AUDITED_DTYPES = {"bf16": torch.bfloat16}
BUDGET = 255  # all that a thread can have: sums, scores and operands are there to fill them
