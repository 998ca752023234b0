"""merge_tokens and its gradient in Triton, each in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..triton_support.arithmetic import narrow, widen
from ..triton_support.image import dense
from ..triton_support.launch import launch, power_of_2

SAMPLES = 4  # whose gradients a thread reads at once, to have that many loads in flight


@dataclass(frozen=True)
class Tile:
    """The shape of a program's tile: fine tokens of one sample by channels."""

    rows: int
    columns: int
    warps: int
    count: int  # of tiles in a sample

    @classmethod
    def of(cls, x: Tensor, most_rows: int) -> Tile:
        """A thread owns 16 bytes of a token's channels, a warp up to a whole row of the tile."""
        _, tokens, channels = x.shape
        a_thread = 16 // x.element_size()
        rows = min(power_of_2(tokens), most_rows)
        columns = min(power_of_2(channels), 32 * a_thread)
        warps = max(1, rows * columns // a_thread // 32)
        return cls(rows, columns, warps, triton.cdiv(tokens, rows) * triton.cdiv(channels, columns))


@triton.jit
def own_tile(height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's tile of a sample: which sample, where in x and in base, and what exists."""
    across = tl.cdiv(channels, COLUMNS)
    down = tl.cdiv(4 * height * width, ROWS)
    index = tl.program_id(0) // across
    token = index % down * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y, x = token // (2 * width), token % (2 * width)
    # base is (h, w, 2, 2, D)
    coarse = (y // 2 * width + x // 2) * 4 + y % 2 * 2 + x % 2
    exists = (y < 2 * height) & (channel < channels)
    fine = token.to(tl.int64) * channels + channel
    return index // down, fine, coarse.to(tl.int64) * channels + channel, exists


@triton.jit
def merge_kernel(
    base, skip, position, x, height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    sample, fine, coarse, exists = own_tile(height, width, channels, ROWS, COLUMNS)
    start = sample.to(tl.int64) * (4 * height * width) * channels
    value = widen(tl.load(base + start + coarse, mask=exists))
    value = value + widen(tl.load(skip + start + fine, mask=exists))
    if position is not None:
        value = value + widen(tl.load(position + fine, mask=exists))
    tl.store(x + start + fine, narrow(value, x.dtype.element_ty), mask=exists)


@triton.jit
def merge_backward_kernel(
    grad,
    grad_base,
    grad_position,
    batch,
    height,
    width,
    channels,
    SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    index, fine, coarse, exists = own_tile(height, width, channels, 1, COLUMNS)
    first = index * SAMPLES
    # The sum over the samples needs all of them in one program, and then in one order.
    end = first + SAMPLES if grad_position is None else batch
    dtype = grad.dtype.element_ty
    total = tl.zeros((1, COLUMNS), tl.float64 if dtype == tl.float64 else tl.float32)
    # Not a range, because the interpreter of Triton 3.6 cannot count one with NumPy 2.4.
    while first < end:
        sample = first + tl.arange(0, SAMPLES)[:, None]
        start = sample.to(tl.int64) * (4 * height * width) * channels
        mask = (sample < batch) & exists
        value = tl.load(grad + start + fine, mask=mask, other=0)
        tl.store(grad_base + start + coarse, value, mask=mask)
        total += tl.sum(widen(value), 0)[None, :]
        first += SAMPLES
    if grad_position is not None:
        total = narrow(total, grad_position.dtype.element_ty)
        tl.store(grad_position + fine, total, mask=exists)


def merge_tokens(
    base: Tensor, skip: Tensor, position: Tensor | None, height: int, width: int
) -> Tensor:
    x = skip.new_empty(skip.shape)
    tile = Tile.of(x, 4)
    tensors = base.contiguous(), skip.contiguous(), dense(position), x
    sizes = height, width, x.shape[2], tile.rows, tile.columns
    launch(merge_kernel, x.device, len(x) * tile.count, *tensors, *sizes, warps=tile.warps)
    return x


def merge_tokens_backward(
    grad: Tensor, position: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = grad.shape
    grad_base = grad.new_empty(batch, tokens // 4, 4 * channels)
    grad_position = None if position is None else position.new_empty(position.shape)
    tile = Tile.of(grad, 1)
    tensors = grad.contiguous(), grad_base, grad_position
    sizes = batch, height, width, channels, SAMPLES, tile.columns
    programs = tile.count * (triton.cdiv(batch, SAMPLES) if position is None else 1)
    launch(merge_backward_kernel, grad.device, programs, *tensors, *sizes, warps=tile.warps)
    return grad_base, grad.new_empty(0) if grad_position is None else grad_position


# Calls that launch every kernel; new(*shape) makes a tensor. See audit/triton.py.
AUDITED = {
    "merge": lambda new: merge_tokens(new(2, 64, 4 * 768), new(2, 256, 768), new(256, 768), 8, 8),
    "merge backward": lambda new: merge_tokens_backward(new(2, 256, 768), new(256, 768), 8, 8),
}
