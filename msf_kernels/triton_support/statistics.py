"""Triton kernels standardise pixels by the mean and deviation of their channel, and restore them.

A kernel holds them as numbers (ROWS, COLUMNS), one for each base pixel of its tile, or None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import divide, widen


@triton.jit
def load_channel(statistic_ptr, tile, extent):
    """Return the number (C,) of each pixel's channel."""
    c = tile[1]
    return widen(tl.load(statistic_ptr + c, mask=c < extent[1], other=1))


@triton.jit
def divide_pair(pair, std):
    """Return pixels (ROWS, COLUMNS, 2) divided by the deviation of their channel."""
    return pair if std is None else divide(pair, std[:, :, None])


@triton.jit
def standardise(pair, mean, std):
    """Return pixels (ROWS, COLUMNS, 2) as (pair - mean) / std."""
    if mean is not None:
        pair = pair - mean[:, :, None]
    return divide_pair(pair, std)


@triton.jit
def restore(pair, mean, std):
    """Return pixels (ROWS, COLUMNS, 2) as pair * std + mean, the inverse of `standardise`."""
    if std is not None:
        pair = pair * std[:, :, None]
    return pair if mean is None else pair + mean[:, :, None]
