"""guided_euler_step and guided_euler_merge in Triton, each in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, empty, in_layout_of
from ..triton_support.arithmetic import clamp, narrow, widen
from ..triton_support.image import (
    LAYOUTS,
    Image,
    ImageTile,
    image,
    launch_tiles,
    load_pair,
    load_pixel,
    own_tile,
    patches,
    store_pair,
    store_pixel,
)
from ..triton_support.launch import Elements, launch
from ..triton_support.resample import upsample
from ..triton_support.statistics import load_channel, restore


@triton.jit
def scalar(number, table, step, DTYPE: tl.constexpr):
    """Row ``step`` of the table (the first if that is None), the number where there is no table."""
    if table is None:
        return tl.full((), number, DTYPE)
    elif step is None:
        return tl.load(table).to(DTYPE)
    else:
        return tl.load(table + tl.load(step)).to(DTYPE)


@triton.jit
def step_kernel(
    x,
    cond,
    uncond,
    start,
    x_next,
    scale: tl.float64,
    scales,
    dt: tl.float64,
    dts,
    step,
    size,
    ELEMENTS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    exists = i < size
    value = widen(tl.load(x + i, mask=exists))
    velocity = widen(tl.load(cond + i, mask=exists))
    if uncond is not None:
        wide = widen(tl.load(uncond + i, mask=exists))
        velocity = wide + scalar(scale, scales, step, value.dtype) * (velocity - wide)
    value = value + scalar(dt, dts, step, value.dtype) * velocity
    if start is not None:
        value = (widen(tl.load(start + i, mask=exists)) + value) * 0.5
    tl.store(x_next + i, narrow(value, x_next.dtype.element_ty), mask=exists)


@triton.jit
def step_of_tokens_kernel(
    x,
    cond,
    uncond,
    start,
    x_next,
    scale: tl.float64,
    scales,
    dt: tl.float64,
    dts,
    step,
    extent,
    PATCH: tl.constexpr,
    PLANAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = own_tile(extent, PLANAR, ROWS, COLUMNS)
    h, w = tile[2], tile[3]
    value = load_pixel(x, tile, h, w)
    velocity = load_pixel(cond, tile, h, w, PATCH)
    if uncond is not None:
        wide = load_pixel(uncond, tile, h, w, PATCH)
        velocity = wide + scalar(scale, scales, step, value.dtype) * (velocity - wide)
    value = value + scalar(dt, dts, step, value.dtype) * velocity
    if start is not None:
        value = (load_pixel(start, tile, h, w) + value) * 0.5
    store_pixel(x_next, tile, value)


@triton.jit
def step_of_pair(
    x, cond, uncond, scale, dt, tile, extent, y, PATCH: tl.constexpr, PLANAR: tl.constexpr
):
    """Two pixels of row y after the step, rounded as a residual of its own would be."""
    value = load_pair(x, tile, extent, y, PLANAR)
    velocity = load_pair(cond, tile, extent, y, PLANAR, 0, PATCH)
    if uncond is not None:
        wide = load_pair(uncond, tile, extent, y, PLANAR, 0, PATCH)
        velocity = wide + scale * (velocity - wide)
    return widen(narrow(value + dt * velocity, x.data.dtype.element_ty))


@triton.jit
def step_merge_kernel(
    x,
    cond,
    uncond,
    base,
    merged,
    scale: tl.float64,
    scales,
    dt: tl.float64,
    dts,
    step,
    mean,
    std,
    low: tl.float64,
    high: tl.float64,
    PATCH: tl.constexpr,
    extent,
    BILINEAR: tl.constexpr,
    PLANAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = own_tile(extent, PLANAR, ROWS, COLUMNS)
    mean, std = load_channel(mean, tile, extent), load_channel(std, tile, extent)
    upper, lower = upsample(base, tile, extent, BILINEAR, PLANAR)
    factor, time = scalar(scale, scales, step, upper.dtype), scalar(dt, dts, step, upper.dtype)
    y = 2 * tile[2]
    top = step_of_pair(x, cond, uncond, factor, time, tile, extent, y, PATCH, PLANAR)
    bottom = step_of_pair(x, cond, uncond, factor, time, tile, extent, y + 1, PATCH, PLANAR)
    top, bottom = upper + restore(top, mean, std), lower + restore(bottom, mean, std)
    store_pair(merged, tile, y, clamp(top, low, high), PLANAR)
    store_pair(merged, tile, y + 1, clamp(bottom, low, high), PLANAR)


def guided_euler_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: Tensor,
    dt: Tensor,
    step: Tensor | None,
    start: Tensor | None,
    patch: int,
) -> Tensor:
    x_next = empty(x)
    scalars = *number(guidance_scale, step), *number(dt, step), step
    if patch:
        tile = ImageTile.of([t for t in (x, start, x_next) if t is not None], 1)
        velocities = (as_image(v, x, patch) for v in (v_cond, v_uncond))
        images = image(x), *velocities, image(start), image(x_next)
        constants = tile.extent, patch, tile.planar, tile.rows, tile.columns
        arguments = *images, *scalars, *constants
        launch(step_of_tokens_kernel, x.device, tile.count, *arguments, warps=tile.warps)
        return x_next
    elements = Elements.of(x.numel(), min(x.element_size(), v_cond.element_size()))
    tensors = *(in_layout_of(t, x) for t in (x, v_cond, v_uncond, start)), x_next
    arguments = *tensors, *scalars, x.numel(), elements.block
    launch(step_kernel, x.device, elements.count, *arguments, warps=elements.warps)
    return x_next


def guided_euler_merge(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: Tensor,
    dt: Tensor,
    step: Tensor | None,
    patch: int,
    base: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    low: float,
    high: float,
) -> Tensor:
    merged = empty(x)
    velocities = (as_image(v, x, patch) for v in (v_cond, v_uncond))
    images = image(x), *velocities, image(base), image(merged)
    scalars = *number(guidance_scale, step), *number(dt, step), step
    numbers = contiguous(mean), contiguous(std), low, high, max(patch, 1)
    launch_tiles(step_merge_kernel, (x, merged), mode, *images, *scalars, *numbers)
    return merged


def as_image(velocity: Tensor | None, x: Tensor, patch: int) -> Image | None:
    if velocity is None or not patch:
        return image(velocity)
    return patches(velocity, patch, x.shape[1], x.shape[3])


def number(value: Tensor, step: Tensor | None) -> tuple[float, Tensor | None]:
    """What the host knows goes by value, the rest as a table; nothing waits for the GPU."""
    if step is None and value.device.type == "cpu":
        return float(value), None
    return 0.0, value.contiguous()


def audited_step(patch: int, new: Callable[..., Tensor]) -> Tensor:
    x = new(2, 16, 64, 64)
    v = new(2, 1024, 64) if patch else new(2, 16, 64, 64)
    step = torch.empty((), dtype=torch.int64, device=x.device)
    return guided_euler_step(x, v, v, new(50), new(50), step, x, patch)


def audited_merge(
    patch: int, mode: str, new: Callable[..., Tensor], standardised: bool = True
) -> Tensor:
    x, base = new(2, 16, 64, 64), new(2, 16, 32, 32)
    v = new(2, 1024, 64) if patch else x
    number = torch.ones((), dtype=torch.float64)
    statistic = new(16) if standardised else None
    tensors = base, statistic, statistic
    return guided_euler_merge(x, v, v, number, number, None, patch, *tensors, mode, -1.0, 1.0)


# Calls that launch every kernel; new(*shape) makes a tensor. See audit/triton.py.
AUDITED = {
    "step": partial(audited_step, 0),
    "step of tokens": partial(audited_step, 2),
    "merge nearest": partial(audited_merge, 0, "nearest"),
    "merge nearest of tokens": partial(audited_merge, 2, "nearest"),
    "merge without statistics": partial(audited_merge, 0, "nearest", standardised=False),
    "merge bilinear of tokens": partial(audited_merge, 2, "bilinear"),
}
AUDITED_LAYOUTS = LAYOUTS
