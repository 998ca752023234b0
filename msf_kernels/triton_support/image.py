"""Triton kernels of images share how a program reads and writes the tile of pixels that it owns.

Two images lie over each other: a base (B, C, H, W) and what is above it (B, C, 2H, 2W). A program
owns a tile of base pixels and the 2x2 pixels above each. A tile's columns run along
the width of planar images (NCHW) and along the channels of others (channels last or any strides),
so that neighbours in a tile are neighbours in memory and 16 bytes are read at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, widen
from .launch import launch, power_of_2, tiles

LAYOUTS = {"planar": torch.contiguous_format, "channels-last": torch.channels_last}


class Image(NamedTuple):
    """An image is its memory and strides; tokens of patches have those from patch to patch."""

    data: Any
    batch: int
    channel: int
    row: int
    column: int
    pixel: int = 0  # from pixel to pixel inside a patch


def image(x: Tensor | None) -> Image | None:
    return None if x is None else Image(x, *x.stride())


def patches(tokens: Tensor, patch: int, channels: int, width: int) -> Image:
    """Return tokens (B, H/p * W/p, p * p * C) as the image (B, C, H, W) that they are."""
    batch, token, channel = tokens.stride()
    return Image(tokens, batch, channel, width // patch * token, token, channels * channel)


@dataclass(frozen=True)
class ImageTile:
    """An image tile is the shape of the programs' tiles over images, and how many there are."""

    extent: tuple[int, ...]  # (B, C, H, W), counted in pixels of a tile
    planar: bool
    rows: int
    columns: int
    warps: int
    count: int

    @classmethod
    def of(cls, images: Sequence[Tensor], scale: int, access: int = 16) -> ImageTile:
        """Make tiles for images of one shape; a pixel of a tile is scale x scale of theirs.

        A thread owns what it reads in ``access`` bytes of a row, and a block has up to 128 threads.
        """
        batch, channels, *sides = images[0].shape
        height, width = (side // scale for side in sides)
        planar = all(x.stride(3) == 1 for x in images)
        inner, wide = (channels, width) if planar else (width, channels)
        high = batch * height * inner
        a_thread = max(1, access // images[0].element_size() // (scale if planar else 1))
        columns = min(power_of_2(wide), 128)
        rows = min(power_of_2(high), max(1, 128 * a_thread // columns))
        warps = max(1, rows * columns // a_thread // 32)
        count = tiles(high, wide, rows, columns)
        return cls((batch, channels, height, width), planar, rows, columns, warps, count)


def launch_tiles(
    kernel: Any, above: Sequence[Tensor], mode: str, *args: Any, bilinear_access: int = 8
) -> None:
    """Start a kernel whose last arguments are the sizes of the base, BILINEAR and the tile's.

    The images ``above`` are (B, C, 2h, 2w). A thread owns 16 bytes of their rows; of a bilinear
    kernel, which holds the pixels around its own too, ``bilinear_access`` bytes.
    """
    bilinear = mode == "bilinear"
    tile = ImageTile.of(above, 2, bilinear_access if bilinear else 16)
    constants = bilinear, tile.planar, tile.rows, tile.columns
    device = above[0].device
    launch(kernel, device, tile.count, *args, tile.extent, *constants, warps=tile.warps)


@triton.jit
def own_tile(extent, PLANAR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's tile: b, c, h, w that broadcast to (ROWS, COLUMNS), and which pixels exist.

    The last two are the columns above it, 2 * COLUMNS of them, and which of those exist: pixels
    above a planar tile are read by the row and split into even and odd ones in registers.
    """
    batch, channels, height, width = extent
    if PLANAR:
        inner, wide = channels, width
    else:
        inner, wide = width, channels
    across = tl.cdiv(wide, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)[:, None]
    first = tl.program_id(0) % across * COLUMNS
    column = first + tl.arange(0, COLUMNS)[None, :]
    above = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :]
    b, h, i = row // inner // height, row // inner % height, row % inner
    exists, exists_above = (b < batch) & (column < wide), (b < batch) & (above < 2 * wide)
    if PLANAR:
        return b, i, h, column, exists, above, exists_above
    else:
        return b, column, h, i, exists, above, exists_above


@triton.jit
def address(image, b, c, y, x, PATCH: tl.constexpr = 1):
    """Where the pixel (b, c, y, x) lies, in an image or in tokens of patches."""
    place = image.data + b.to(tl.int64) * image.batch + c.to(tl.int64) * image.channel
    if PATCH > 1:
        place += (y % PATCH * PATCH + x % PATCH).to(tl.int64) * image.pixel
        y, x = y // PATCH, x // PATCH
    return place + y.to(tl.int64) * image.row + x.to(tl.int64) * image.column


@triton.jit
def load_pixel(image, tile, y, x, PATCH: tl.constexpr = 1):
    """The pixels (y, x), one for each of the tile's: (ROWS, COLUMNS)."""
    b, c, _, _, exists, _, _ = tile
    return widen(tl.load(address(image, b, c, y, x, PATCH), mask=exists))


@triton.jit
def store_pixel(image, tile, value):
    b, c, h, w, exists, _, _ = tile
    tl.store(address(image, b, c, h, w), narrow(value, image.data.dtype.element_ty), mask=exists)


@triton.jit
def load_pair(
    image, tile, extent, y, PLANAR: tl.constexpr, SHIFT: tl.constexpr = 0, PATCH: tl.constexpr = 1
):
    """The two pixels of row y above base pixel w + SHIFT: (ROWS, COLUMNS, 2).

    Outside the image the edge's base pixel repeats.
    """
    b, c, _, w, exists, above, exists_above = tile
    if PLANAR:
        if SHIFT < 0:
            above = tl.where(above < 2, above, above - 2)
        if SHIFT > 0:
            above = tl.where(above + 2 < 2 * extent[3], above + 2, above)
        pixels = tl.load(address(image, b, c, y, above, PATCH), mask=exists_above)
        return widen(tl.reshape(pixels, (exists.shape[0], exists.shape[1], 2)))
    else:
        x = 2 * nearest(w + SHIFT, extent[3])
        left = tl.load(address(image, b, c, y, x, PATCH), mask=exists)
        right = tl.load(address(image, b, c, y, x + 1, PATCH), mask=exists)
        return widen(tl.join(left, right))


@triton.jit
def store_pair(image, tile, y, pair, PLANAR: tl.constexpr):
    b, c, _, w, exists, above, exists_above = tile
    pair = narrow(pair, image.data.dtype.element_ty)
    if PLANAR:
        pixels = tl.reshape(pair, (exists.shape[0], 2 * exists.shape[1]))
        tl.store(address(image, b, c, y, above), pixels, mask=exists_above)
    else:
        left, right = tl.split(pair)
        tl.store(address(image, b, c, y, 2 * w), left, mask=exists)
        tl.store(address(image, b, c, y, 2 * w + 1), right, mask=exists)


@triton.jit
def nearest(i, size):
    """The index nearest to i that exists."""
    return tl.minimum(tl.maximum(i, 0), size - 1)
