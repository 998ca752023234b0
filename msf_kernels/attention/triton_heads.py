"""Heads in Triton kernels: how tiles of tokens are read, normed, rotated, multiplied and written.

The sides of Triton's tiles are powers of two, so the d channels of a head are cut into pieces:
72 = 64 + 8, the 8 padded to 16, the fewest that a tensor core multiplies. PIECES has (first, width,
joined) of each: where it begins in either half of a head and how wide it is there.

A tile of tokens is a tuple of matrices. That of v has one for each piece, channels as they lie in
memory. That of q and k has either half by itself, as a rotation needs them, or, of a `joined`
piece, both in one in the order (0, d/2, 1, d/2 + 1, ...), about which a product over d does not
care. Tokens beyond the last repeat it: what they lead to is masked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..triton_support.arithmetic import INTERPRETED, narrow, widen

LOG2_E = tl.constexpr(1.4426950408889634)


class Tokens(NamedTuple):
    """Tokens (B, N, channels), the channels neighbours; those of qkv with what prepares q and k.

    The strides of samples and tokens are counted in `unit` elements. The compiler then knows that
    they are multiples of it, and reads 16 bytes at once where unit is 8 and an element has 2 bytes.
    By itself Triton only knows multiples of 16, which one head of 72 channels (216) has not.
    """

    data: Any
    batch: int
    token: int
    unit: Any
    length: int  # N
    heads: int
    q_weight: Any = None
    k_weight: Any = None
    rope: Any = None
    eps: Any = tl.constexpr(0.0)  # a number in a tuple would be float32, for float64 too little


@triton.jit
def rows(x, PART: tl.constexpr, index, token, DIM: tl.constexpr):
    """Where these tokens' channels begin, of head `index` = b * H + h and q, k or v (0, 1, 2)."""
    batch, head = (index // x.heads).to(tl.int64), index % x.heads
    token = tl.minimum(token, x.length - 1).to(tl.int64)[:, None]
    batch, token = batch * x.batch * x.unit, token * x.token * x.unit
    return x.data + batch + token + (PART * x.heads + head) * DIM


@triton.jit
def load_piece(start, FIRST: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    """Columns FIRST, FIRST + 1, ...; zero from END on."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH <= END:
        return tl.load(start + column)
    else:
        return tl.load(start + column, mask=column < END, other=0)


@triton.jit
def load(x, PART: tl.constexpr, index, token, DIM: tl.constexpr, PIECES: tl.constexpr):
    """A tile of tokens, channels in the order of memory; zero past the last channel."""
    start, tile = rows(x, PART, index, token, DIM), ()
    for i in tl.static_range(len(PIECES)):
        tile = tile + (load_piece(start, 2 * PIECES[i][0], 2 * PIECES[i][1], DIM),)
    return tile


@triton.jit
def store(x, PART: tl.constexpr, index, token, tile, DIM: tl.constexpr, PIECES: tl.constexpr):
    start, exists = rows(x, PART, index, token, DIM), (token < x.length)[:, None]
    for i in tl.static_range(len(PIECES)):
        channel = 2 * PIECES[i][0] + tl.arange(0, 2 * PIECES[i][1])[None, :]
        value = narrow(tile[i], x.data.dtype.element_ty)
        tl.store(start + channel, value, mask=exists & (channel < DIM))


@triton.jit
def load_halves(start, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """The channels FIRST, FIRST + 1, ... of either half, widened; zero past its end."""
    HALF: tl.constexpr = (DIM + 1) // 2
    first = load_piece(start, FIRST, WIDTH, HALF)
    second = load_piece(start + HALF, FIRST, WIDTH, DIM - HALF)
    return widen(first), widen(second)


@triton.jit
def store_halves(start, exists, first, second, FIRST: tl.constexpr, DIM: tl.constexpr):
    HALF: tl.constexpr = (DIM + 1) // 2
    dtype: tl.constexpr = start.dtype.element_ty
    channel = FIRST + tl.arange(0, first.shape[1])[None, :]
    tl.store(start + channel, narrow(first, dtype), mask=exists & (channel < HALF))
    exists = exists & (channel < DIM - HALF)
    tl.store(start + channel + HALF, narrow(second, dtype), mask=exists)


@triton.jit
def reciprocal_rms(start, eps, DIM: tl.constexpr, PIECES: tl.constexpr):
    squares = 0.0
    for i in tl.static_range(len(PIECES)):
        first, second = load_halves(start, PIECES[i][0], PIECES[i][1], DIM)
        squares += tl.sum(first * first + second * second, 1)
    return tl.rsqrt(squares * (1 / DIM) + tl.full((), eps, squares.dtype))[:, None]


@triton.jit
def angles(x, token, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Cosines and sines of the rotations of these channels of the first half."""
    HALF: tl.constexpr = DIM // 2
    start = x.rope + tl.minimum(token, x.length - 1)[:, None] * HALF
    sin = load_piece(start + x.length * HALF, FIRST, WIDTH, HALF)
    return load_piece(start, FIRST, WIDTH, HALF), sin


@triton.jit
def prepare_piece(
    x,
    start,
    token,
    weight,
    rrms,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    DIM: tl.constexpr,
):
    FIRST: tl.constexpr = PIECES[PIECE][0]
    WIDTH: tl.constexpr = PIECES[PIECE][1]
    first, second = load_halves(start, FIRST, WIDTH, DIM)
    if weight is not None:
        first_weight, second_weight = load_halves(weight, FIRST, WIDTH, DIM)
        first, second = first * rrms * first_weight, second * rrms * second_weight
    if x.rope is not None:
        cos, sin = angles(x, token, FIRST, WIDTH, DIM)
        first, second = first * cos - second * sin, second * cos + first * sin
    dtype: tl.constexpr = x.data.dtype.element_ty
    if PIECES[PIECE][2]:
        # Narrowed first, it would be reshaped in shared memory, at which Triton 3.6 fails.
        return (narrow(tl.reshape(tl.join(first, second), (first.shape[0], 2 * WIDTH)), dtype),)
    else:
        return narrow(first, dtype), narrow(second, dtype)


@triton.jit
def prepare(x, PART: tl.constexpr, index, token, DIM: tl.constexpr, PIECES: tl.constexpr):
    """A tile of q (0) or k (1) after norm and rotation, rounded to its dtype."""
    start, tile = rows(x, PART, index, token, DIM), ()
    weight = x.q_weight if PART == 0 else x.k_weight
    rrms = None if weight is None else reciprocal_rms(start, x.eps, DIM, PIECES)
    for i in tl.static_range(len(PIECES)):
        tile = tile + prepare_piece(x, start, token, weight, rrms, i, PIECES, DIM)
    return tile


@triton.jit
def dot(a, b, total):
    """total + a @ b."""
    if a.dtype == tl.float64:  # Triton 3.6 fails to compile most of its products of float64
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    elif INTERPRETED:  # which would multiply the bits of bfloat16
        return tl.dot(widen(a), widen(b), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def zeros_like(tile, dtype: tl.constexpr):
    result = ()
    for i in tl.static_range(len(tile)):
        result = result + (tl.zeros(tile[i].shape, dtype),)
    return result


@triton.jit
def dot_channels(a, b):
    """a @ b^T of two tiles of tokens."""
    dtype: tl.constexpr = tl.float64 if a[0].dtype == tl.float64 else tl.float32
    total = tl.zeros((a[0].shape[0], b[0].shape[0]), dtype)
    for i in tl.static_range(len(a)):
        total = dot(a[i], tl.trans(b[i]), total)
    return total


@triton.jit
def dot_tokens(a, b, total):
    """total + a @ b of a matrix with a column for each token of the tile b."""
    result = ()
    for i in tl.static_range(len(b)):
        result = result + (dot(narrow(a, b[i].dtype), b[i], total[i]),)
    return result
