"""pyramid_split, pyramid_merge and their gradients in Triton, each in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, empty
from ..triton_support.arithmetic import clamp
from ..triton_support.image import (
    image,
    launch_tiles,
    load_pair,
    load_pixel,
    own_tile,
    store_pair,
    store_pixel,
)
from ..triton_support.resample import pool, upsample, upsample_adjoint
from ..triton_support.statistics import divide_pair, load_channel, restore, standardise


@triton.jit
def split_kernel(
    x,  # Image (B, C, 2h, 2w)
    base,  # Image (B, C, h, w)
    residual,  # Image (B, C, 2h, 2w)
    mean_ptr,  # (C,) or absent
    std_ptr,  # (C,) or absent
    extent,
    CHUNK: tl.constexpr,
    PLANAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Split x into base and residual, with extent = (B, C, h, w)."""
    tile = own_tile(extent, PLANAR, ROWS, COLUMNS)
    mean = None if mean_ptr is None else load_channel(mean_ptr, tile, extent)
    std = None if std_ptr is None else load_channel(std_ptr, tile, extent)
    y = 2 * tile[2]
    top = load_pair(x, tile, y, PLANAR)
    bottom = load_pair(x, tile, y + 1, PLANAR)
    upper, lower = upsample(x, tile, extent, CHUNK, PLANAR, True)
    store_pixel(base, tile, pool(top, bottom))
    store_pair(residual, tile, y, standardise(top - upper, mean, std), PLANAR)
    store_pair(residual, tile, y + 1, standardise(bottom - lower, mean, std), PLANAR)


@triton.jit
def split_backward_kernel(
    grad_base,  # Image (B, C, h, w) or absent
    grad_residual,  # Image (B, C, 2h, 2w) or absent
    grad_x,  # Image (B, C, 2h, 2w)
    std_ptr,  # (C,) or absent
    extent,
    CHUNK: tl.constexpr,
    PLANAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradient of x from those of base and residual, with extent = (B, C, h, w)."""
    tile = own_tile(extent, PLANAR, ROWS, COLUMNS)
    y = 2 * tile[2]
    if grad_residual is None:
        quarter = load_pixel(grad_base, tile, tile[2], tile[3]) * 0.25
        top = tl.join(quarter, quarter)
        bottom = top
    else:
        std = None if std_ptr is None else load_channel(std_ptr, tile, extent)
        top = divide_pair(load_pair(grad_residual, tile, y, PLANAR), std)
        bottom = divide_pair(load_pair(grad_residual, tile, y + 1, PLANAR), std)
        pooled = -upsample_adjoint(grad_residual, std, tile, extent, top, bottom, CHUNK, PLANAR)
        if grad_base is not None:
            pooled = pooled + load_pixel(grad_base, tile, tile[2], tile[3])
        quarter = (pooled * 0.25)[:, :, None]
        top, bottom = top + quarter, bottom + quarter
    store_pair(grad_x, tile, y, top, PLANAR)
    store_pair(grad_x, tile, y + 1, bottom, PLANAR)


@triton.jit
def merge_kernel(
    base,  # Image (B, C, h, w)
    residual,  # Image (B, C, 2h, 2w)
    x,  # Image (B, C, 2h, 2w)
    mean_ptr,  # (C,) or absent
    std_ptr,  # (C,) or absent
    low: tl.float64,
    high: tl.float64,
    extent,
    CHUNK: tl.constexpr,
    PLANAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge base and residual into x, with extent = (B, C, h, w)."""
    tile = own_tile(extent, PLANAR, ROWS, COLUMNS)
    mean = None if mean_ptr is None else load_channel(mean_ptr, tile, extent)
    std = None if std_ptr is None else load_channel(std_ptr, tile, extent)
    y = 2 * tile[2]
    upper, lower = upsample(base, tile, extent, CHUNK, PLANAR)
    top = upper + restore(load_pair(residual, tile, y, PLANAR), mean, std)
    bottom = lower + restore(load_pair(residual, tile, y + 1, PLANAR), mean, std)
    store_pair(x, tile, y, clamp(top, low, high), PLANAR)
    store_pair(x, tile, y + 1, clamp(bottom, low, high), PLANAR)


@triton.jit
def merge_backward_kernel(
    grad,  # Image (B, C, 2h, 2w)
    grad_base,  # Image (B, C, h, w)
    grad_residual,  # Image (B, C, 2h, 2w)
    std_ptr,  # (C,) or absent
    extent,
    CHUNK: tl.constexpr,
    PLANAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradients of base and residual, with extent = (B, C, h, w)."""
    tile = own_tile(extent, PLANAR, ROWS, COLUMNS)
    y = 2 * tile[2]
    std = None if std_ptr is None else load_channel(std_ptr, tile, extent)
    top = load_pair(grad, tile, y, PLANAR)
    bottom = load_pair(grad, tile, y + 1, PLANAR)
    pooled = upsample_adjoint(grad, None, tile, extent, top, bottom, CHUNK, PLANAR)
    store_pixel(grad_base, tile, pooled)
    store_pair(grad_residual, tile, y, restore(top, None, std), PLANAR)
    store_pair(grad_residual, tile, y + 1, restore(bottom, None, std), PLANAR)


def pyramid_split(
    x: Tensor, mean: Tensor | None, std: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    base, residual = empty(x, batch, channels, height // 2, width // 2), empty(x)
    launch_tiles(
        split_kernel,
        (x, residual),
        mode,
        x=image(x),
        base=image(base),
        residual=image(residual),
        mean_ptr=contiguous(mean),
        std_ptr=contiguous(std),
    )
    return base, residual


def pyramid_split_backward(
    grad_base: Tensor | None, grad_residual: Tensor | None, std: Tensor | None, mode: str
) -> Tensor:
    if grad_base is not None:
        batch, channels, height, width = grad_base.shape
        grad = empty(grad_base, batch, channels, 2 * height, 2 * width)
    else:
        assert grad_residual is not None
        grad = empty(grad_residual)
    above = (grad,) if grad_residual is None else (grad, grad_residual)
    launch_tiles(
        split_backward_kernel,
        above,
        mode,
        grad_base=image(grad_base),
        grad_residual=image(grad_residual),
        grad_x=image(grad),
        std_ptr=contiguous(std),
    )
    return grad


def pyramid_merge(
    base: Tensor,
    residual: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    low: float,
    high: float,
) -> Tensor:
    x = empty(base, *residual.shape)
    launch_tiles(
        merge_kernel,
        (residual, x),
        mode,
        base=image(base),
        residual=image(residual),
        x=image(x),
        mean_ptr=contiguous(mean),
        std_ptr=contiguous(std),
        low=low,
        high=high,
    )
    return x


def pyramid_merge_backward(grad: Tensor, std: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = grad.shape
    grad_base, grad_residual = empty(grad, batch, channels, height // 2, width // 2), empty(grad)
    launch_tiles(
        merge_backward_kernel,
        (grad, grad_residual),
        mode,
        grad=image(grad),
        grad_base=image(grad_base),
        grad_residual=image(grad_residual),
        std_ptr=contiguous(std),
    )
    return grad_base, grad_residual
