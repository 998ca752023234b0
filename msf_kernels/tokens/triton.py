"""merge_tokens and its gradient in Triton, each in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, contiguous_samples, empty_like
from ..triton_support.arithmetic import narrow, widen
from ..triton_support.launch import launch, power_of_2, tiles

# A thread reads the gradients of so many samples at once, to have as many loads in flight.
SAMPLES = 4


class Tokens(NamedTuple):
    """Tokens (B, N, D) are their memory and the stride of the batch; samples are contiguous."""

    ptr: Any
    batch: int


@dataclass(frozen=True)
class TokenTile:
    """A program's tile is ``rows`` tokens by ``columns`` channels; there are ``count`` tiles."""

    rows: int
    columns: int
    warps: int
    count: int

    @classmethod
    def of(cls, tokens: int, channels: int, element_size: int, max_rows: int) -> TokenTile:
        """Give a thread 16 bytes of a token's channels, a warp up to a whole row of the tile."""
        a_thread = 16 // element_size
        rows = min(power_of_2(tokens), max_rows)
        columns = min(power_of_2(channels), 32 * a_thread)
        warps = max(1, rows * columns // a_thread // 32)
        return cls(rows, columns, warps, tiles(tokens, channels, rows, columns))


@triton.jit
def own_channels(channels, COLUMNS: tl.constexpr):
    """Return which tile in the column of tiles is this program's, and its channels (1, COLUMNS)."""
    across = tl.cdiv(channels, COLUMNS)
    channel = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.program_id(0) // across, channel


@triton.jit
def offsets(token, channel, width, channels):
    """Return where an element of a sample's fine tokens lies, and where in base (h, w, 2, 2, D)."""
    y, x = token // (2 * width), token % (2 * width)
    coarse = (y // 2 * width + x // 2) * 4 + y % 2 * 2 + x % 2
    return token.to(tl.int64) * channels + channel, coarse.to(tl.int64) * channels + channel


@triton.jit
def start(tokens, sample):
    """Return the first element of a sample."""
    return tokens.ptr + sample.to(tl.int64) * tokens.batch


@triton.jit
def merge_kernel(
    base,  # Tokens (B, h * w, 4 * D)
    skip,  # Tokens (B, 4 * h * w, D)
    position_ptr,  # (4 * h * w, D) or absent
    condition,  # Tokens (B, C, D) or absent
    x,  # Tokens (B, C + 4 * h * w, D)
    batch,
    height,
    width,
    channels,
    CONDITION: tl.constexpr,  # C
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write ROWS tokens of x by COLUMNS channels, counted over all samples."""
    index, channel = own_channels(channels, COLUMNS)
    row = index * ROWS + tl.arange(0, ROWS)[:, None]
    tokens = CONDITION + 4 * height * width
    sample, place = row // tokens, row % tokens
    token = place - CONDITION
    exists = (sample < batch) & (channel < channels)
    merged = exists & (token >= 0)
    fine, coarse = offsets(token, channel, width, channels)
    value = widen(tl.load(start(base, sample) + coarse, mask=merged))
    value = value + widen(tl.load(start(skip, sample) + fine, mask=merged))
    if position_ptr is not None:
        value = value + widen(tl.load(position_ptr + fine, mask=merged))
    own = place.to(tl.int64) * channels + channel
    if CONDITION:
        kept = tl.load(start(condition, sample) + own, mask=exists & (token < 0))
        value = tl.where(token < 0, widen(kept), value)
    tl.store(start(x, sample) + own, narrow(value, x.ptr.dtype.element_ty), mask=exists)


@triton.jit
def merge_backward_kernel(
    grad,  # Tokens (B, 4 * h * w, D)
    grad_base_ptr,  # (B, h * w, 4 * D)
    grad_position_ptr,  # (4 * h * w, D) or absent
    batch,
    height,
    width,
    channels,
    SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Give a program one fine token of SAMPLES samples, or for the position's gradient of all."""
    index, channel = own_channels(channels, COLUMNS)
    tokens = 4 * height * width
    first = index // tokens * SAMPLES
    end = first + SAMPLES if grad_position_ptr is None else batch
    fine, coarse = offsets(index % tokens, channel, width, channels)
    dtype = grad.ptr.dtype.element_ty
    total = tl.zeros((1, COLUMNS), tl.float64 if dtype == tl.float64 else tl.float32)
    # Not a range, because the interpreter of Triton 3.6 cannot count one with NumPy 2.4.
    while first < end:
        sample = first + tl.arange(0, SAMPLES)[:, None]
        exists = (sample < batch) & (channel < channels)
        value = tl.load(start(grad, sample) + fine, mask=exists, other=0)
        own = grad_base_ptr + sample.to(tl.int64) * tokens * channels
        tl.store(own + coarse, value, mask=exists)
        total += tl.sum(widen(value), 0)[None, :]
        first += SAMPLES
    if grad_position_ptr is not None:
        total = narrow(total, grad_position_ptr.dtype.element_ty)
        tl.store(grad_position_ptr + fine, total, mask=channel < channels)


def merge_tokens(
    base: Tensor,
    skip: Tensor,
    position: Tensor | None,
    condition: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    batch, tokens, channels = skip.shape
    count = 0 if condition is None else condition.shape[1]
    x = skip.new_empty((batch, count + tokens, channels))
    tile = TokenTile.of(batch * (count + tokens), channels, x.element_size(), 4)
    launch(
        merge_kernel,
        x.device,
        tile.count,
        base=_tokens(base),
        skip=_tokens(skip),
        position_ptr=contiguous(position),
        condition=_tokens(condition) if count else None,
        x=_tokens(x),
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        CONDITION=count,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        warps=tile.warps,
    )
    return x


def merge_tokens_backward(
    grad: Tensor, position: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = grad.shape
    grad_base = grad.new_empty(batch, tokens // 4, 4 * channels)
    grad_position = None if position is None else empty_like(position)
    groups = triton.cdiv(batch, SAMPLES) if position is None else 1
    tile = TokenTile.of(groups * tokens, channels, grad.element_size(), 1)
    launch(
        merge_backward_kernel,
        grad.device,
        tile.count,
        grad=_tokens(grad),
        grad_base_ptr=grad_base,
        grad_position_ptr=grad_position,
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        SAMPLES=SAMPLES,
        COLUMNS=tile.columns,
        warps=tile.warps,
    )
    return grad_base, grad.new_empty(0) if grad_position is None else grad_position


def _tokens(x: Tensor | None) -> Tokens | None:
    x = contiguous_samples(x)
    return None if x is None else Tokens(x, x.stride(0))
