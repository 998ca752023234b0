"""What Triton's attention does with a tile of tokens: reads, multiplies and writes it.

A tile is a tuple of matrices, one for each piece of a head's channels (triton_tile.py), zero past
the last channel. Tokens beyond the last repeat it: what they lead to is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_support.arithmetic import INTERPRETED, narrow, widen

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def token_starts(x, index, token, extent, TILE: tl.constexpr):
    """Return where tokens of head ``index`` = b * H + h begin (BLOCK, 1); extent is (N, H)."""
    batch, head = (index // extent[1]).to(tl.int64), (index % extent[1]).to(tl.int64)
    token = tl.minimum(token, extent[0] - 1).to(tl.int64)[:, None]
    return x.ptr + (batch * x.batch + head * x.head + token * x.token) * TILE.unit


@triton.jit
def load_piece(start, FIRST: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    """Return the WIDTH columns FIRST, FIRST + 1, ...; zero from END on."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH <= END:
        return tl.load(start + column)
    else:
        return tl.load(start + column, mask=column < END, other=0)


@triton.jit
def load(x, index, token, extent, TILE: tl.constexpr):
    """Return a tile of tokens."""
    start, tile = token_starts(x, index, token, extent, TILE), ()
    for i in tl.static_range(len(TILE.pieces)):
        tile = tile + (load_piece(start, TILE.pieces[i][0], TILE.pieces[i][1], TILE.dim),)
    return tile


@triton.jit
def store(x, index, token, tile, extent, TILE: tl.constexpr):
    """Write a tile of tokens."""
    start, exists = token_starts(x, index, token, extent, TILE), (token < extent[0])[:, None]
    for i in tl.static_range(len(tile)):
        column = TILE.pieces[i][0] + tl.arange(0, TILE.pieces[i][1])[None, :]
        value = narrow(tile[i], x.ptr.dtype.element_ty)
        tl.store(start + column, value, mask=exists & (column < TILE.dim))


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


@triton.jit
def zeros_like(tile, dtype: tl.constexpr):
    """Return a tile of zeros in the shape of another."""
    result = ()
    for i in tl.static_range(len(tile)):
        result = result + (tl.zeros(tile[i].shape, dtype),)
    return result


@triton.jit
def scale_rows(tile, factor):
    """Return every row of a tile times its factor."""
    result = ()
    for i in tl.static_range(len(tile)):
        result = result + (tile[i] * factor[:, None],)
    return result


@triton.jit
def row_sums(x, y):
    """Return the sums of x times y over the channels of each token (BLOCK,)."""
    total = 0.0
    for i in tl.static_range(len(x)):
        total += tl.sum(widen(x[i]) * widen(y[i]), 1)
    return total
