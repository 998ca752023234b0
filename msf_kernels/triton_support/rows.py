"""Rows of D channels in Triton kernels: which rows a program has, and in which pieces.

A tile's sides are powers of two and the width of a transformer is not: a row is up to 9 pieces of
one power of two, 384 = 3 * 128, 768 = 3 * 256, 1152 = 9 * 128, 1536 = 3 * 512. So no lane idles at
these widths, all pieces lie in the registers alike, which spares exchanges between threads, and a
sum over a row is a sum of pieces, then one over a piece. A tile is a tuple of pieces (ROWS, PIECE):

    D = 1152     piece 0 | piece 1 | ... | piece 8    a row of (B, N, D), pieces of 128
    ROWS tokens  (ROWS, 128)                          what a program holds of each piece
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, widen
from .launch import launch, power_of_2

PARTIALS, CHANNELS = 32, 32  # what a program of `sum_kernel` reads at once


@dataclass(frozen=True)
class Walk:
    """A walk says how programs go through (B, N, D): each a slice of a sample, by a few rows."""

    piece: int
    pieces: int
    rows: int
    warps: int
    slices: int  # of a sample
    slice_rows: int
    count: int

    @classmethod
    def of(cls, x: Tensor, programs: int, min_rows: int, held: int = 36) -> Walk:
        """Cut each sample of x (B, N, D) into slices of at least ``min_rows`` rows.

        There are about ``programs`` slices in all, and at least one for each sample. A thread holds
        up to ``held`` bytes of a row, which it reads 4 to 16 bytes at once; a block has 128 threads
        or, where a row is too wide for them, up to 1024. The pieces are those with the fewest idle
        lanes, and of those the widest.
        """
        batch, tokens, channels = x.shape
        threads = min(power_of_2(triton.cdiv(channels * x.element_size(), held)), 1024)
        widest = min(max(threads * 16 // x.element_size(), 64), power_of_2(channels))
        widths = [widest] + [width for width in (widest // 2, widest // 4) if width >= 64]
        piece = min(widths, key=lambda width: (triton.cdiv(channels, width) * width, -width))
        rows = min(max(128 // threads, 1), power_of_2(tokens))
        slices = max(min(tokens // min_rows, triton.cdiv(programs, max(batch, 1))), 1)
        slice_rows = triton.cdiv(triton.cdiv(tokens, slices), rows) * rows
        slices = max(triton.cdiv(tokens, max(slice_rows, 1)), 1)
        warps = max(rows * threads // 32, 1)
        count = batch * slices if channels else 0
        return cls(piece, triton.cdiv(channels, piece), rows, warps, slices, slice_rows, count)

    def sizes(self, x: Tensor) -> dict[str, Any]:
        """Return the arguments of kernels that walk through x (B, N, D).

        PIECES are the numbers of the pieces, known when a kernel is compiled.
        """
        return {
            "tokens": x.shape[1],
            "slices": self.slices,
            "slice_rows": self.slice_rows,
            "PIECES": tuple(map(tl.constexpr, range(self.pieces))),
            "PIECE": self.piece,
            "ROWS": self.rows,
            "D": x.shape[2],
        }


class Modulation(NamedTuple):
    """A modulation is a vector of channels a sample, (B, D) or (1, D), and the samples' stride."""

    ptr: Any
    stride: int


def modulation(x: Tensor | None) -> Modulation | None:
    """Return x as a Modulation, in place if its channels are contiguous, as in a chunk (B, 6D)."""
    if x is None:
        return None
    if x.stride(1) != 1:
        x = x.contiguous()
    return Modulation(x, 0 if x.shape[0] == 1 else x.stride(0))


@triton.jit
def own_slice(tokens, slices, slice_rows):
    """Return this program's sample, its first token and the one after its last."""
    sample = tl.program_id(0) // slices
    first = tl.program_id(0) % slices * slice_rows
    return sample.to(tl.int64), first, tl.minimum(first + slice_rows, tokens)


@triton.jit
def load_row(start, exists, columns, D: tl.constexpr):
    """Return the tile of the rows that start at ``start`` (ROWS, 1), widened; 0 beyond them."""
    return [widen(tl.load(start + c, mask=exists & (c < D), other=0)) for c in columns]


@triton.jit
def load_modulation(modulation, sample, columns, ROWS: tl.constexpr, D: tl.constexpr):
    """Return a sample's modulation once for each row of a tile.

    It then lies in the registers as the rows do, and threads need not exchange it.
    """
    start = tl.zeros((ROWS, 1), tl.int64) + sample * modulation.stride
    return load_row(modulation.ptr + start, True, columns, D)


@triton.jit
def store_row(start, exists, columns, value, D: tl.constexpr):
    """Write a tile to the rows that start at ``start`` (ROWS, 1)."""
    dtype = start.dtype.element_ty
    for i in tl.static_range(len(columns)):
        tl.store(start + columns[i], narrow(value[i], dtype), mask=exists & (columns[i] < D))


@triton.jit
def mean_of_row(value, D: tl.constexpr):
    """Return the means (ROWS, 1) of a tile's rows, in which 0 stands for what does not exist."""
    total = value[0]
    for i in tl.static_range(1, len(value)):
        total += value[i]
    return tl.sum(total, 1, keep_dims=True) * (1.0 / D)


@triton.jit
def sum_kernel(
    partials_ptrs,  # a tuple of (groups, count, D)
    totals_ptrs,  # a tuple of (groups, D)
    count,
    D,
    PARTIALS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the sums over ``count`` to CHANNELS channels of one group of each of the totals."""
    across = tl.cdiv(D, CHANNELS)
    group = (tl.program_id(0) // across).to(tl.int64)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    for i in tl.static_range(len(totals_ptrs)):
        total = tl.zeros((PARTIALS, CHANNELS), partials_ptrs[i].dtype.element_ty)
        first = group * count
        while first < group * count + count:
            row = first + tl.arange(0, PARTIALS)[:, None]
            exists = (row < group * count + count) & (channel < D)
            total += tl.load(partials_ptrs[i] + row * D + channel, mask=exists, other=0)
            first += PARTIALS
        value = narrow(tl.sum(total, 0, keep_dims=True), totals_ptrs[i].dtype.element_ty)
        tl.store(totals_ptrs[i] + group * D + channel, value, mask=channel < D)


def sum_partials(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write the sums of partials (groups * count, D) to totals (groups, D), for each such pair.

    The order of the sum depends on the sizes alone. Totals of one shape share a launch.
    """
    for groups in {len(total) for _, total in pairs if len(total)}:
        partials, totals = zip(*(pair for pair in pairs if len(pair[1]) == groups))
        rows, channels = partials[0].shape
        launch(
            sum_kernel,
            partials[0].device,
            groups * triton.cdiv(channels, CHANNELS),
            partials_ptrs=partials,
            totals_ptrs=totals,
            count=rows // groups,
            D=channels,
            PARTIALS=PARTIALS,
            CHANNELS=CHANNELS,
            warps=4,
        )
