"""How Triton reads, norms, rotates and writes tiles of heads.

A tile is ROWS heads, counted (B, N, H), by half a head. The two halves of a head are two tiles, so
that the pairs (i, i + d / 2) that RoPE rotates lie in one place of both:

    first     0     | 1         | ...    (ROWS, WIDTH), WIDTH the power of 2 from d / 2 on
    second    d / 2 | d / 2 + 1 | ...    (ROWS, WIDTH)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..triton_support.arithmetic import divide, narrow, widen


class Heads(NamedTuple):
    """Heads (B, N, H, d) are their memory and strides, from head to head in UNITs of elements.

    Triton knows of a number whether it is a multiple of 16, which 72 is not; of a product with UNIT
    it knows UNIT, and reads 8 bytes at once.
    """

    ptr: Any
    batch: int
    token: int
    head: int
    element: int


@triton.jit
def own_heads(index, extent, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the heads of tile ``index`` (batch, token, head), and elements of their first half."""
    row = index * ROWS + tl.arange(0, ROWS)[:, None]
    _, tokens, heads = extent
    return row // heads // tokens, row // heads % tokens, row % heads, tl.arange(0, WIDTH)[None, :]


@triton.jit
def places(x, tile, extent, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return where the two halves of the heads lie, and which of their elements exist."""
    batch, token, head, i = tile
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    start = batch.to(tl.int64) * x.batch + token.to(tl.int64) * x.token + head.to(tl.int64) * x.head
    first = x.ptr + start * UNIT + i.to(tl.int64) * x.element
    exists = batch < extent[0]
    second = first + tl.full((), half, tl.int64) * x.element
    return first, second, exists & (i < half), exists & (half + i < HEAD_DIM)


@triton.jit
def load_heads(x, tile, extent, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the two halves of the heads, widened; 0 where nothing exists."""
    first, second, exists, paired = places(x, tile, extent, UNIT, HEAD_DIM)
    first, second = tl.load(first, mask=exists, other=0), tl.load(second, mask=paired, other=0)
    return widen(first), widen(second)


@triton.jit
def store_heads(x, tile, extent, first, second, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write the two halves of the heads."""
    to_first, to_second, exists, paired = places(x, tile, extent, UNIT, HEAD_DIM)
    tl.store(to_first, narrow(first, x.ptr.dtype.element_ty), mask=exists)
    tl.store(to_second, narrow(second, x.ptr.dtype.element_ty), mask=paired)


@triton.jit
def load_weight(weight_ptr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the two halves (1, WIDTH) of a norm's weight or bias, widened."""
    i, half = tl.arange(0, WIDTH)[None, :], (HEAD_DIM + 1) // 2
    first = tl.load(weight_ptr + i, mask=i < half, other=0)
    return widen(first), widen(tl.load(weight_ptr + half + i, mask=half + i < HEAD_DIM, other=0))


@triton.jit
def load_raw(x, bias_ptr, tile, extent, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the two halves of the heads with their bias (H, d), widened."""
    first, second = load_heads(x, tile, extent, UNIT, HEAD_DIM)
    if bias_ptr is not None:
        batch, _, head, i = tile
        at, half = head * HEAD_DIM + i, (HEAD_DIM + 1) // 2
        exists = batch < extent[0]
        first += widen(tl.load(bias_ptr + at, mask=exists & (i < half), other=0))
        paired = exists & (half + i < HEAD_DIM)
        second += widen(tl.load(bias_ptr + half + at, mask=paired, other=0))
    return first, second


@triton.jit
def rotate(first, second, rope_ptr, tile, extent, SIGN: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rotate heads by the angles of their tokens, forwards (SIGN = 1) or back (-1)."""
    batch, token, _, i = tile
    half: tl.constexpr = HEAD_DIM // 2
    cosines, exists = rope_ptr + token * half + i, (batch < extent[0]) & (i < half)
    cos = tl.load(cosines, mask=exists, other=1)
    sin = SIGN * tl.load(cosines + extent[1] * half, mask=exists, other=0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def mean(x, HEAD_DIM: tl.constexpr):
    """Return the mean of each head, whose two halves are already added."""
    return divide(tl.sum(x, 1)[:, None], tl.full((), HEAD_DIM, x.dtype))


@triton.jit
def centre(first, second, tile, extent, HEAD_DIM: tl.constexpr):
    """Subtract the mean of each head from its elements, and keep 0 where nothing exists."""
    batch, _, _, i = tile
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    middle = mean(first + second, HEAD_DIM)
    exists = batch < extent[0]
    first = tl.where(exists & (i < half), first - middle, 0)
    return first, tl.where(exists & (half + i < HEAD_DIM), second - middle, 0)


@triton.jit
def reciprocal_rms(first, second, eps, HEAD_DIM: tl.constexpr):
    """Return 1 / sqrt(mean(x * x) + eps) of each head (ROWS, 1)."""
    squares = mean(first * first + second * second, HEAD_DIM)
    return tl.rsqrt(squares + tl.full((), eps, squares.dtype))


@triton.jit
def store_partials(start, first, second, HEAD_DIM: tl.constexpr):
    """Write the two halves of rows of sums that start at ``start``."""
    i, half = tl.arange(0, first.shape[1])[None, :], (HEAD_DIM + 1) // 2
    tl.store(start + i, first, mask=i < half)
    tl.store(start + half + i, second, mask=half + i < HEAD_DIM)
