"""Pooling and upsampling by 2 in registers, in Triton.

The additions follow the order of pyramid/reference.py, so that results agree with it bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import divide, narrow, widen
from .image import load_pair, load_pixel, nearest
from .statistics import divide_pair


@triton.jit
def pool(top, bottom):
    """Return the mean of 2x2 pixels, given their two rows (ROWS, COLUMNS, 2)."""
    left, right = tl.split(top + bottom)
    return (left + right) * 0.25


@triton.jit
def blend(near, far):
    """Return a pixel upsampled linearly by 2 along one axis, with half-pixel centres."""
    return 0.75 * near + 0.25 * far


@triton.jit
def load_base(base, tile, extent, y, SHIFT: tl.constexpr, POOL: tl.constexpr, PLANAR: tl.constexpr):
    """Return base pixels (y, w + SHIFT), with POOL pooled from above and rounded as if stored."""
    if POOL:
        top = load_pair(base, tile, extent, 2 * y, PLANAR, SHIFT)
        bottom = load_pair(base, tile, extent, 2 * y + 1, PLANAR, SHIFT)
        return widen(narrow(pool(top, bottom), base.ptr.dtype.element_ty))
    elif SHIFT == 0:  # without a clamp, which the compiler cannot see to change nothing
        return load_pixel(base, tile, y, tile[3])
    else:
        return load_pixel(base, tile, y, nearest(tile[3] + SHIFT, extent[3]))


@triton.jit
def upsample_rows(
    base, tile, extent, SHIFT: tl.constexpr, POOL: tl.constexpr, PLANAR: tl.constexpr
):
    """Return the two rows above row h of column w + SHIFT, upsampled along the height."""
    h, height = tile[2], extent[2]
    own = load_base(base, tile, extent, h, SHIFT, POOL, PLANAR)
    before = load_base(base, tile, extent, nearest(h - 1, height), SHIFT, POOL, PLANAR)
    after = load_base(base, tile, extent, nearest(h + 1, height), SHIFT, POOL, PLANAR)
    return blend(own, before), blend(own, after)


@triton.jit
def upsample(
    base, tile, extent, BILINEAR: tl.constexpr, PLANAR: tl.constexpr, POOL: tl.constexpr = False
):
    """Return the two rows of two pixels above each base pixel, (ROWS, COLUMNS, 2) each."""
    if BILINEAR:
        top, bottom = upsample_rows(base, tile, extent, 0, POOL, PLANAR)
        top_left, bottom_left = upsample_rows(base, tile, extent, -1, POOL, PLANAR)
        top_right, bottom_right = upsample_rows(base, tile, extent, 1, POOL, PLANAR)
        top = tl.join(blend(top, top_left), blend(top, top_right))
        return top, tl.join(blend(bottom, bottom_left), blend(bottom, bottom_right))
    else:
        own = load_base(base, tile, extent, tile[2], 0, POOL, PLANAR)
        pair = tl.join(own, own)
        return pair, pair


@triton.jit
def adjoint_rows(above, top, bottom, below):
    """Return what base row h gets of the rows 2h - 1 to 2h + 2 that it was blended into."""
    return 0.75 * (top + bottom) + 0.25 * (below + above)


@triton.jit
def adjoint_of_column(grad, std, tile, extent, x):
    """Return what base row h gets of column x of grad / std."""
    y, height = 2 * tile[2], 2 * extent[2]
    above = load_pixel(grad, tile, nearest(y - 1, height), x)
    top, bottom = load_pixel(grad, tile, y, x), load_pixel(grad, tile, y + 1, x)
    below = load_pixel(grad, tile, nearest(y + 2, height), x)
    if std is not None:
        above, top = divide(above, std), divide(top, std)
        bottom, below = divide(bottom, std), divide(below, std)
    return adjoint_rows(above, top, bottom, below)


@triton.jit
def upsample_adjoint(
    grad, std, tile, extent, top, bottom, BILINEAR: tl.constexpr, PLANAR: tl.constexpr
):
    """Return what each base pixel gets of grad / std, given its two rows above it."""
    if BILINEAR:
        y, x, height, width = 2 * tile[2], 2 * tile[3], 2 * extent[2], 2 * extent[3]
        above = load_pair(grad, tile, extent, nearest(y - 1, height), PLANAR)
        below = load_pair(grad, tile, extent, nearest(y + 2, height), PLANAR)
        rows = adjoint_rows(divide_pair(above, std), top, bottom, divide_pair(below, std))
        left, right = tl.split(rows)
        before = adjoint_of_column(grad, std, tile, extent, nearest(x - 1, width))
        after = adjoint_of_column(grad, std, tile, extent, nearest(x + 2, width))
        return 0.75 * (left + right) + 0.25 * (after + before)
    else:
        return pool(top, bottom) * 4
