"""Heads in Triton kernels: how tiles of tokens are read, normed, rotated, multiplied and written.

The sides of Triton's tiles are powers of two, so the d channels of a head are cut into pieces:
72 = 64 + 8, the 8 padded to 16, the fewest that a tensor core multiplies. PIECES has (first, width,
joined) of each: where it begins in either half of a head and how wide it is there.

A tile of tokens is a tuple of matrices. With d = 72 and PIECES = ((0, 32, joined), (32, 8, True))
they have these channels, of which those past 71, or past 35 in the first half, are zero:

                        piece 0                      piece 1
    v, out and grad_out 0 .. 63                      64 .. 79
    q and k             0 .. 31 and 36 .. 67         32 .. 39 and 68 .. 75
        joined          0, 36, 1, 37, .. 31, 67      32, 68, .. 39, 75

q and k have either half by itself, as a rotation needs them, or, of a joined piece, both in one
matrix, interleaved; a product over d does not care about the order of channels. Tokens beyond the
last repeat it: what they lead to is masked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..triton_support.arithmetic import INTERPRETED, narrow, widen

LOG2_E = tl.constexpr(1.4426950408889634)


class Tokens(NamedTuple):
    """Tokens are (B, N, channels) in memory, channels side by side, and what prepares q and k.

    The strides of samples and tokens are counted in `unit` elements. The compiler then knows that
    they are multiples of it, and reads 16 bytes at once where unit is 8 and an element has 2 bytes.
    By itself Triton only knows multiples of 16, which one head of 72 channels (216) has not.
    """

    ptr: Any
    batch: int
    token: int
    unit: Any
    length: int  # N
    heads: int
    q_weight_ptr: Any = None  # (d,)
    k_weight_ptr: Any = None  # (d,)
    rope_ptr: Any = None  # (2, N, d / 2)
    eps: Any = tl.constexpr(0.0)  # a number in a tuple would be float32, for float64 too little


@triton.jit
def rows(x, PART: tl.constexpr, index, token, HEAD_DIM: tl.constexpr):
    """Return where these tokens' channels of head `index` = b * H + h begin.

    PART is 0, 1 or 2 for q, k or v, and 0 for tokens that have one part.
    """
    batch, head = (index // x.heads).to(tl.int64), index % x.heads
    token = tl.minimum(token, x.length - 1).to(tl.int64)[:, None]
    batch, token = batch * x.batch * x.unit, token * x.token * x.unit
    return x.ptr + batch + token + (PART * x.heads + head) * HEAD_DIM


@triton.jit
def load_piece(start, FIRST: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    """Return the WIDTH columns FIRST, FIRST + 1, ...; zero from END on."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH <= END:
        return tl.load(start + column)
    else:
        return tl.load(start + column, mask=column < END, other=0)


@triton.jit
def load(x, PART: tl.constexpr, index, token, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr):
    """Return a tile of tokens, channels in the order of memory; zero past the last channel."""
    start, tile = rows(x, PART, index, token, HEAD_DIM), ()
    for i in tl.static_range(len(PIECES)):
        tile = tile + (load_piece(start, 2 * PIECES[i][0], 2 * PIECES[i][1], HEAD_DIM),)
    return tile


@triton.jit
def store(x, PART: tl.constexpr, index, token, tile, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr):
    """Write a tile of tokens, channels in the order of memory."""
    start, exists = rows(x, PART, index, token, HEAD_DIM), (token < x.length)[:, None]
    for i in tl.static_range(len(PIECES)):
        channel = 2 * PIECES[i][0] + tl.arange(0, 2 * PIECES[i][1])[None, :]
        value = narrow(tile[i], x.ptr.dtype.element_ty)
        tl.store(start + channel, value, mask=exists & (channel < HEAD_DIM))


@triton.jit
def load_halves(start, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the channels FIRST, FIRST + 1, ... of either half, widened; zero past its end."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    first = load_piece(start, FIRST, WIDTH, HALF)
    second = load_piece(start + HALF, FIRST, WIDTH, HEAD_DIM - HALF)
    return widen(first), widen(second)


@triton.jit
def store_halves(start, exists, first, second, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write the channels FIRST, FIRST + 1, ... of either half."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    dtype: tl.constexpr = start.dtype.element_ty
    channel = FIRST + tl.arange(0, first.shape[1])[None, :]
    tl.store(start + channel, narrow(first, dtype), mask=exists & (channel < HALF))
    exists = exists & (channel < HEAD_DIM - HALF)
    tl.store(start + channel + HALF, narrow(second, dtype), mask=exists)


@triton.jit
def reciprocal_rms(start, eps, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr):
    """Return 1 / sqrt(mean(x * x) + eps) of each token's head (BLOCK, 1)."""
    squares = 0.0
    for i in tl.static_range(len(PIECES)):
        first, second = load_halves(start, PIECES[i][0], PIECES[i][1], HEAD_DIM)
        squares += tl.sum(first * first + second * second, 1)
    return tl.rsqrt(squares * (1 / HEAD_DIM) + tl.full((), eps, squares.dtype))[:, None]


@triton.jit
def angles(x, token, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return cosines and sines of the rotations of these channels of the first half."""
    HALF: tl.constexpr = HEAD_DIM // 2
    start = x.rope_ptr + tl.minimum(token, x.length - 1)[:, None] * HALF
    sin = load_piece(start + x.length * HALF, FIRST, WIDTH, HALF)
    return load_piece(start, FIRST, WIDTH, HALF), sin


@triton.jit
def prepare_piece(
    x,
    start,
    token,
    weight_ptr,
    rrms,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Return piece PIECE of a tile of q or k after norm and rotation, one matrix or two halves."""
    FIRST: tl.constexpr = PIECES[PIECE][0]
    WIDTH: tl.constexpr = PIECES[PIECE][1]
    first, second = load_halves(start, FIRST, WIDTH, HEAD_DIM)
    if weight_ptr is not None:
        first_weight, second_weight = load_halves(weight_ptr, FIRST, WIDTH, HEAD_DIM)
        first, second = first * rrms * first_weight, second * rrms * second_weight
    if x.rope_ptr is not None:
        cos, sin = angles(x, token, FIRST, WIDTH, HEAD_DIM)
        first, second = first * cos - second * sin, second * cos + first * sin
    dtype: tl.constexpr = x.ptr.dtype.element_ty
    if PIECES[PIECE][2]:
        # A narrowed one would be reshaped in shared memory, at which Triton 3.6 fails.
        return (narrow(tl.reshape(tl.join(first, second), (first.shape[0], 2 * WIDTH)), dtype),)
    else:
        return narrow(first, dtype), narrow(second, dtype)


@triton.jit
def prepare(x, PART: tl.constexpr, index, token, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr):
    """Return a tile of q (PART 0) or k (1) after norm and rotation, rounded to its dtype."""
    start, tile = rows(x, PART, index, token, HEAD_DIM), ()
    weight_ptr = x.q_weight_ptr if PART == 0 else x.k_weight_ptr
    rrms = None if weight_ptr is None else reciprocal_rms(start, x.eps, HEAD_DIM, PIECES)
    for i in tl.static_range(len(PIECES)):
        tile = tile + prepare_piece(x, start, token, weight_ptr, rrms, i, PIECES, HEAD_DIM)
    return tile


@triton.jit
def dot(a, b, total):
    """Return total + a @ b."""
    if a.dtype == tl.float64:  # Triton 3.6 fails to compile most products of float64.
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    elif INTERPRETED:  # The interpreter would multiply the bits of bfloat16.
        return tl.dot(widen(a), widen(b), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def zeros_like(tile, dtype: tl.constexpr):
    """Return a tile of zeros in the shape of another."""
    result = ()
    for i in tl.static_range(len(tile)):
        result = result + (tl.zeros(tile[i].shape, dtype),)
    return result


@triton.jit
def dot_channels(a, b):
    """Return a @ b^T of two tiles of tokens."""
    dtype: tl.constexpr = tl.float64 if a[0].dtype == tl.float64 else tl.float32
    total = tl.zeros((a[0].shape[0], b[0].shape[0]), dtype)
    for i in tl.static_range(len(a)):
        total = dot(a[i], tl.trans(b[i]), total)
    return total


@triton.jit
def dot_tokens(a, b, total):
    """Return total + a @ b of a matrix with a column for each token of the tile b."""
    result = ()
    for i in tl.static_range(len(b)):
        result = result + (dot(narrow(a, b[i].dtype), b[i], total[i]),)
    return result
