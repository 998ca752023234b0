"""guided_euler_step and guided_euler_merge in Triton, each in one pass over memory."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, empty, in_layout_of
from ..recording import number
from ..triton_support.arithmetic import clamp, narrow, widen
from ..triton_support.image import (
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
def scalar(number, table_ptr, step_ptr, DTYPE: tl.constexpr):
    """Return the number or, where there is a table (S,), its row ``step``, 0 by default."""
    if table_ptr is None:
        return tl.full((), number, DTYPE)
    elif step_ptr is None:
        return tl.load(table_ptr).to(DTYPE)
    else:
        return tl.load(table_ptr + tl.load(step_ptr)).to(DTYPE)


@triton.jit
def step_kernel(
    x_ptr,  # (size,)
    v_cond_ptr,  # (size,)
    v_uncond_ptr,  # (size,) or absent
    start_ptr,  # (size,) or absent
    x_next_ptr,  # (size,)
    guidance_scale: tl.float64,
    guidance_scale_ptr,  # (S,), () or absent: then guidance_scale counts
    dt: tl.float64,
    dt_ptr,  # (S,), () or absent: then dt counts
    step_ptr,  # () or absent
    size,
    BLOCK: tl.constexpr,
):
    """Step where the velocities lie in memory as x does."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = i < size
    x = widen(tl.load(x_ptr + i, mask=exists))
    velocity = widen(tl.load(v_cond_ptr + i, mask=exists))
    if v_uncond_ptr is not None:
        v_uncond = widen(tl.load(v_uncond_ptr + i, mask=exists))
        scale = scalar(guidance_scale, guidance_scale_ptr, step_ptr, x.dtype)
        velocity = v_uncond + scale * (velocity - v_uncond)
    x = x + scalar(dt, dt_ptr, step_ptr, x.dtype) * velocity
    if start_ptr is not None:
        x = (widen(tl.load(start_ptr + i, mask=exists)) + x) * 0.5
    tl.store(x_next_ptr + i, narrow(x, x_next_ptr.dtype.element_ty), mask=exists)


@triton.jit
def step_of_tokens_kernel(
    x,  # Image (B, C, H, W)
    v_cond,  # Image (B, C, H, W) of tokens (B, H/p * W/p, p * p * C)
    v_uncond,  # Image of tokens as v_cond, or absent
    start,  # Image (B, C, H, W) or absent
    x_next,  # Image (B, C, H, W)
    guidance_scale: tl.float64,
    guidance_scale_ptr,  # (S,), () or absent: then guidance_scale counts
    dt: tl.float64,
    dt_ptr,  # (S,), () or absent: then dt counts
    step_ptr,  # () or absent
    extent,
    PATCH: tl.constexpr,
    PLANAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Step a tile of pixels of x, with extent = (B, C, H, W)."""
    tile = own_tile(extent, PLANAR, ROWS, COLUMNS)
    h, w = tile[2], tile[3]
    value = load_pixel(x, tile, h, w)
    velocity = load_pixel(v_cond, tile, h, w, PATCH)
    if v_uncond is not None:
        wide = load_pixel(v_uncond, tile, h, w, PATCH)
        scale = scalar(guidance_scale, guidance_scale_ptr, step_ptr, value.dtype)
        velocity = wide + scale * (velocity - wide)
    value = value + scalar(dt, dt_ptr, step_ptr, value.dtype) * velocity
    if start is not None:
        value = (load_pixel(start, tile, h, w) + value) * 0.5
    store_pixel(x_next, tile, value)


@triton.jit
def step_of_pair(
    x, v_cond, v_uncond, scale, dt, tile, extent, y, PATCH: tl.constexpr, PLANAR: tl.constexpr
):
    """Return two pixels of row y after the step, rounded as a residual of its own would be."""
    value = load_pair(x, tile, y, PLANAR)
    velocity = load_pair(v_cond, tile, y, PLANAR, PATCH)
    if v_uncond is not None:
        wide = load_pair(v_uncond, tile, y, PLANAR, PATCH)
        velocity = wide + scale * (velocity - wide)
    return widen(narrow(value + dt * velocity, x.ptr.dtype.element_ty))


@triton.jit
def step_merge_kernel(
    x,  # Image (B, C, 2h, 2w)
    v_cond,  # Image (B, C, 2h, 2w), or with PATCH > 1 of tokens
    v_uncond,  # Image as v_cond, or absent
    base,  # Image (B, C, h, w)
    merged,  # Image (B, C, 2h, 2w)
    guidance_scale: tl.float64,
    guidance_scale_ptr,  # (S,), () or absent: then guidance_scale counts
    dt: tl.float64,
    dt_ptr,  # (S,), () or absent: then dt counts
    step_ptr,  # () or absent
    mean_ptr,  # (C,) or absent
    std_ptr,  # (C,) or absent
    low: tl.float64,
    high: tl.float64,
    PATCH: tl.constexpr,
    extent,
    CHUNK: tl.constexpr,
    PLANAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Step the pixels above a tile of base pixels and merge them, with extent = (B, C, h, w)."""
    tile = own_tile(extent, PLANAR, ROWS, COLUMNS)
    mean = None if mean_ptr is None else load_channel(mean_ptr, tile, extent)
    std = None if std_ptr is None else load_channel(std_ptr, tile, extent)
    upper, lower = upsample(base, tile, extent, CHUNK, PLANAR)
    scale = scalar(guidance_scale, guidance_scale_ptr, step_ptr, upper.dtype)
    time = scalar(dt, dt_ptr, step_ptr, upper.dtype)
    y = 2 * tile[2]
    top = step_of_pair(x, v_cond, v_uncond, scale, time, tile, extent, y, PATCH, PLANAR)
    bottom = step_of_pair(x, v_cond, v_uncond, scale, time, tile, extent, y + 1, PATCH, PLANAR)
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
    patch: int | None,
) -> Tensor:
    x_next = empty(x)
    scalars = scalar_arguments(guidance_scale, dt, step)
    if patch:
        tile = ImageTile.of([t for t in (x, start, x_next) if t is not None], 1)
        launch(
            step_of_tokens_kernel,
            x.device,
            tile.count,
            x=image(x),
            v_cond=as_image(v_cond, x, patch),
            v_uncond=as_image(v_uncond, x, patch),
            start=image(start),
            x_next=image(x_next),
            **scalars,
            PATCH=patch,
            **tile.arguments(),
            warps=tile.warps,
        )
        return x_next
    elements = Elements.of(x.numel(), min(x.element_size(), v_cond.element_size()))
    launch(
        step_kernel,
        x.device,
        elements.count,
        x_ptr=in_layout_of(x, x),
        v_cond_ptr=in_layout_of(v_cond, x),
        v_uncond_ptr=in_layout_of(v_uncond, x),
        start_ptr=in_layout_of(start, x),
        x_next_ptr=x_next,
        **scalars,
        size=x.numel(),
        BLOCK=elements.block,
        warps=elements.warps,
    )
    return x_next


def guided_euler_merge(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: Tensor,
    dt: Tensor,
    step: Tensor | None,
    patch: int | None,
    base: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    low: float,
    high: float,
) -> Tensor:
    merged = empty(x)
    launch_tiles(
        step_merge_kernel,
        (x, merged),
        mode,
        x=image(x),
        v_cond=as_image(v_cond, x, patch),
        v_uncond=as_image(v_uncond, x, patch),
        base=image(base),
        merged=image(merged),
        **scalar_arguments(guidance_scale, dt, step),
        mean_ptr=contiguous(mean),
        std_ptr=contiguous(std),
        low=low,
        high=high,
        PATCH=patch or 1,
    )
    return merged


def as_image(velocity: Tensor | None, x: Tensor, patch: int | None) -> Image | None:
    """Return a velocity, tokens of patches where there is a patch, as an Image of x's shape."""
    if velocity is None or not patch:
        return image(velocity)
    return patches(velocity, patch, x.shape[1], x.shape[3])


def scalar_arguments(guidance_scale: Tensor, dt: Tensor, step: Tensor | None) -> dict[str, Any]:
    """Return the arguments of kernels that `scalar` takes.

    What the host knows goes by value, the rest as a table, so nothing waits for the GPU.
    """
    arguments: dict[str, Any] = {"step_ptr": step}
    for name, value in {"guidance_scale": guidance_scale, "dt": dt}.items():
        known = step is None and value.device.type == "cpu"
        arguments[name] = number(value) if known else 0.0
        arguments[f"{name}_ptr"] = None if known else value.contiguous()
    return arguments
