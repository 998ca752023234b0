"""Triton kernels of rows of D channels share how programs walk the rows, and in which pieces.

A tile's sides are powers of two and the width of a transformer is not: a row is up to 9 pieces of
one power of two, 384 = 3 * 128, 768 = 3 * 256, 1152 = 9 * 128, 1536 = 3 * 512. So no lane idles at
these widths, all pieces lie in the registers alike, which spares exchanges between threads, and a
sum over a row is a sum of pieces, then one over a piece. A tile is a tuple of pieces (ROWS, PIECE).
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

PARTIALS, CHANNELS = 32, 32  # a program of `sum_kernel` reads so many at once


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
    def of(cls, x: Tensor, programs: int, min_rows: int) -> Walk:
        """Make about ``programs``, one a sample or more, of ``min_rows`` or all its rows each.

        A thread has up to 36 bytes of a row as wide as a transformer's, in accesses of 4 to 16
        bytes, and a block 128 threads or, where a row is wider, up to 1024. The pieces are those
        with the fewest idle lanes, and of those the widest.
        """
        batch, tokens, channels = x.shape
        threads = min(power_of_2(triton.cdiv(channels * x.element_size(), 36)), 1024)
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

    def sizes(self, x: Tensor) -> tuple[Any, ...]:
        """Return arguments of kernels: tokens, slices, slice_rows, PIECES, PIECE, ROWS, D.

        PIECES are the numbers of the pieces, known when a kernel is compiled.
        """
        pieces = tuple(map(tl.constexpr, range(self.pieces)))
        tokens, channels = x.shape[1:]
        return tokens, self.slices, self.slice_rows, pieces, self.piece, self.rows, channels


class Modulation(NamedTuple):
    """A modulation is a vector of channels a sample, (B, D) or (1, D), and the samples' stride."""

    data: Any
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
    """This program's sample, its first token and the one after its last."""
    sample = tl.program_id(0) // slices
    first = tl.program_id(0) % slices * slice_rows
    return sample.to(tl.int64), first, tl.minimum(first + slice_rows, tokens)


@triton.jit
def load_row(start, exists, columns, D: tl.constexpr):
    """Tiles of the rows that start there, widened; 0 where nothing exists."""
    return [widen(tl.load(start + c, mask=exists & (c < D), other=0)) for c in columns]


@triton.jit
def load_modulation(modulation, sample, columns, ROWS: tl.constexpr, D: tl.constexpr):
    """Once for each row of a tile, in the layout of the rows: no exchange between threads."""
    start = tl.zeros((ROWS, 1), tl.int64) + sample * modulation.stride
    return load_row(modulation.data + start, True, columns, D)


@triton.jit
def store_row(start, exists, columns, value, D: tl.constexpr):
    dtype = start.dtype.element_ty
    for i in tl.static_range(len(columns)):
        tl.store(start + columns[i], narrow(value[i], dtype), mask=exists & (columns[i] < D))


@triton.jit
def mean_of_row(value, D: tl.constexpr):
    """(ROWS, 1); what does not exist must be 0."""
    total = value[0]
    for i in tl.static_range(1, len(value)):
        total += value[i]
    return tl.sum(total, 1, keep_dims=True) * (1.0 / D)


@triton.jit
def sum_kernel(partials, totals, count, D, PARTIALS: tl.constexpr, CHANNELS: tl.constexpr):
    """totals (groups, D) of partials (groups, count, D)."""
    across = tl.cdiv(D, CHANNELS)
    group = (tl.program_id(0) // across).to(tl.int64)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    for i in tl.static_range(len(totals)):
        total = tl.zeros((PARTIALS, CHANNELS), partials[i].dtype.element_ty)
        first = group * count
        while first < group * count + count:
            row = first + tl.arange(0, PARTIALS)[:, None]
            exists = (row < group * count + count) & (channel < D)
            total += tl.load(partials[i] + row * D + channel, mask=exists, other=0)
            first += PARTIALS
        value = narrow(tl.sum(total, 0, keep_dims=True), totals[i].dtype.element_ty)
        tl.store(totals[i] + group * D + channel, value, mask=channel < D)


def sum_partials(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write the sums of partials (groups * count, D) to totals (groups, D), for each such pair.

    The order of the sum depends on the sizes alone. Totals of one shape share a launch.
    """
    for groups in {len(total) for _, total in pairs if len(total)}:
        partials, totals = zip(*(pair for pair in pairs if len(pair[1]) == groups))
        rows, channels = partials[0].shape
        launch(
            *(sum_kernel, partials[0].device, groups * triton.cdiv(channels, CHANNELS)),
            *(partials, totals, rows // groups, channels, PARTIALS, CHANNELS),
            warps=4,
        )
