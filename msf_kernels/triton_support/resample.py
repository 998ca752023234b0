"""Pooling and upsampling by 2 in registers, in Triton.

The additions follow the order of pyramid/reference.py, so that results agree with it bit for bit.

CHUNK is how many base pixels a thread owns side by side; 0 says that the mode is nearest. In the
bilinear mode a thread takes a pixel's neighbours, on the SIDE left (-1) or right (1), from its own
registers, and loads only those outside of its chunk.
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
def halves(x):
    """Return the even and the odd columns of x (ROWS, COLUMNS)."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def end(x, SIDE: tl.constexpr, CHUNK: tl.constexpr):
    """Return the column of x at one side of each chunk of columns, the left (-1) or right (1)."""
    if CHUNK == 1:
        return x
    else:
        return end(halves(x)[(SIDE + 1) // 2], SIDE, CHUNK // 2)


@triton.jit
def ends(tile, SIDE: tl.constexpr, CHUNK: tl.constexpr):
    """Return the tile of base pixels at one side of each chunk.

    What is above stays that of the whole tile: load pairs of it with PLANAR=False.
    """
    b, c, h, w, exists, above, exists_above = tile
    return b, c, h, end(w, SIDE, CHUNK), end(exists, SIDE, CHUNK), above, exists_above


@triton.jit
def beside(x, outside, SIDE: tl.constexpr, CHUNK: tl.constexpr):
    """Return what is at one side of each column of x, given what is there outside of each chunk."""
    if CHUNK == 1:
        return outside
    else:
        even, odd = halves(x)
        if SIDE < 0:
            return tl.interleave(beside(odd, outside, SIDE, CHUNK // 2), even)
        else:
            return tl.interleave(odd, beside(even, outside, SIDE, CHUNK // 2))


@triton.jit
def load_base(base, tile, y, POOL: tl.constexpr, PLANAR: tl.constexpr):
    """Return base pixels (y, w), with POOL pooled from above and rounded as if stored."""
    if POOL:
        top, bottom = load_pair(base, tile, 2 * y, PLANAR), load_pair(base, tile, 2 * y + 1, PLANAR)
        return widen(narrow(pool(top, bottom), base.ptr.dtype.element_ty))
    else:
        return load_pixel(base, tile, y, tile[3])


@triton.jit
def upsample_rows(base, tile, extent, POOL: tl.constexpr, PLANAR: tl.constexpr):
    """Return the two rows above row h of each column, upsampled along the height."""
    h, height = tile[2], extent[2]
    own = load_base(base, tile, h, POOL, PLANAR)
    before = load_base(base, tile, nearest(h - 1, height), POOL, PLANAR)
    after = load_base(base, tile, nearest(h + 1, height), POOL, PLANAR)
    return blend(own, before), blend(own, after)


@triton.jit
def upsample_beside(
    top, bottom, base, tile, extent, SIDE: tl.constexpr, CHUNK: tl.constexpr, POOL: tl.constexpr
):
    """Return the rows of `upsample_rows` for columns w + SIDE, given those of columns w."""
    b, c, h, w, exists, above, exists_above = ends(tile, SIDE, CHUNK)
    outside = b, c, h, nearest(w + SIDE, extent[3]), exists, above, exists_above
    outer_top, outer_bottom = upsample_rows(base, outside, extent, POOL, PLANAR=False)
    return beside(top, outer_top, SIDE, CHUNK), beside(bottom, outer_bottom, SIDE, CHUNK)


@triton.jit
def upsample(
    base, tile, extent, CHUNK: tl.constexpr, PLANAR: tl.constexpr, POOL: tl.constexpr = False
):
    """Return the two rows of two pixels above each base pixel, (ROWS, COLUMNS, 2) each."""
    if CHUNK > 0:
        top, bottom = upsample_rows(base, tile, extent, POOL, PLANAR)
        left = upsample_beside(top, bottom, base, tile, extent, -1, CHUNK, POOL)
        right = upsample_beside(top, bottom, base, tile, extent, 1, CHUNK, POOL)
        upper = tl.join(blend(top, left[0]), blend(top, right[0]))
        return upper, tl.join(blend(bottom, left[1]), blend(bottom, right[1]))
    else:
        own = load_base(base, tile, tile[2], POOL, PLANAR)
        pair = tl.join(own, own)
        return pair, pair


@triton.jit
def adjoint_rows(above, top, bottom, below):
    """Return what base row h gets of the rows 2h - 1 to 2h + 2 that it was blended into."""
    return 0.75 * (top + bottom) + 0.25 * (below + above)


@triton.jit
def adjoint_beside(rows, grad, std, tile, extent, SIDE: tl.constexpr, CHUNK: tl.constexpr):
    """Return what base row h gets of the columns of grad / std at one side of each base pixel.

    ``rows`` is what it gets of the columns on the other side, those above the base pixel.
    """
    edges = ends(tile, SIDE, CHUNK)
    y, height = 2 * tile[2], 2 * extent[2]
    x = nearest(2 * edges[3] + (2 if SIDE > 0 else -1), 2 * extent[3])
    above = load_pixel(grad, edges, nearest(y - 1, height), x)
    top, bottom = load_pixel(grad, edges, y, x), load_pixel(grad, edges, y + 1, x)
    below = load_pixel(grad, edges, nearest(y + 2, height), x)
    if std is not None:
        above, top = divide(above, std), divide(top, std)
        bottom, below = divide(bottom, std), divide(below, std)
    return beside(rows, adjoint_rows(above, top, bottom, below), SIDE, CHUNK)


@triton.jit
def upsample_adjoint(
    grad, std, tile, extent, top, bottom, CHUNK: tl.constexpr, PLANAR: tl.constexpr
):
    """Return what each base pixel gets of grad / std, given its two rows above it."""
    if CHUNK > 0:
        y, height = 2 * tile[2], 2 * extent[2]
        above = load_pair(grad, tile, nearest(y - 1, height), PLANAR)
        below = load_pair(grad, tile, nearest(y + 2, height), PLANAR)
        rows = adjoint_rows(divide_pair(above, std), top, bottom, divide_pair(below, std))
        left, right = tl.split(rows)
        before = adjoint_beside(right, grad, std, tile, extent, -1, CHUNK)
        after = adjoint_beside(left, grad, std, tile, extent, 1, CHUNK)
        return 0.75 * (left + right) + 0.25 * (after + before)
    else:
        return pool(top, bottom) * 4
