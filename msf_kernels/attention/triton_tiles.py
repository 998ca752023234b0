"""Tiles in Triton's attention: how a head's tokens are cut, read, multiplied and written.

The sides of Triton's tiles are powers of two, so the d channels of a head are cut into pieces:
72 = 64 + 8, the 8 padded to 16, the fewest that a tensor core multiplies. A tile of tokens is a
tuple of matrices, one for each piece, zero past the last channel. Tokens beyond the last repeat it:
what they lead to is masked.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from ..triton_support.arithmetic import INTERPRETED, narrow, widen
from ..triton_support.launch import power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tile:
    """A tile says which tokens a program has and through which it goes; kernels know it all."""

    unit: int  # elements, in which the strides of Heads are counted
    dim: int
    pieces: tuple[tuple[int, int], ...]  # (first, width) of channels
    block: int  # a program's own tokens
    step: int  # tokens of a step
    steps: int
    rest: int  # tokens after the steps, padded to a power of two; 0 for none
    masked: bool  # whether all these reach beyond the last token
    warps: int
    stages: int

    @classmethod
    @functools.cache
    def of(
        cls, tokens: int, dim: int, unit: int, element_size: int, backward: bool, wgmma: bool
    ) -> Tile:
        """Make tiles as large as the audit finds no spills at.

        With wgmma, operands stay in shared memory; else those of a step are copied to registers.
        Products of float32 are none for tensor cores.
        """
        stages = 3 if wgmma and dim <= 96 and not backward else 2
        if not backward:
            block, step = 128, 64 if wgmma else 32
        elif wgmma:
            block, step = 128 if dim <= 96 else 64, 64 if dim <= 80 else 32
        else:
            block, step = 64 if dim <= 72 else 32, 16
        if element_size > 2:
            block = step = 128 // element_size
        block = min(block, max(16, power_of_2(tokens)))
        step = min(step, max(16, power_of_2(tokens + 1) // 2))
        steps, rest = divmod(tokens, step)
        rest = max(16, power_of_2(rest)) if rest else 0
        if rest == step:
            steps, rest = steps + 1, 0
        masked = steps * step + rest > tokens
        warps = 8 if block == 128 or (backward and block == 64) else 4
        cut = pieces(dim)
        return cls(unit, dim, cut, block, step, steps, rest, masked, warps, stages)

    @classmethod
    def of_head(cls, tokens: int, dim: int, unit: int) -> Tile:
        """Make the tile of a program that has all tokens of a head, whose pieces are of halves."""
        block = max(16, power_of_2(tokens))
        return cls(unit, dim, pieces((dim + 1) // 2), block, 0, 0, 0, block > tokens, 8, 1)


def pieces(channels: int) -> tuple[tuple[int, int], ...]:
    """Return (first, width) of powers of two from 16 on that cover the channels with least waste.

    There are at most two, the second narrower than the first.
    """
    main = max(16, power_of_2(channels + 1) // 2)
    rest = max(16, power_of_2(channels - main)) if channels > main else 0
    if rest == main:
        return ((0, 2 * main),)
    return ((0, main), (main, rest)) if rest else ((0, main),)


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
