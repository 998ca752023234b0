"""Triton kernels of images share how a program reads and writes the tile of pixels that it owns.

Two images lie over each other: a base (B, C, h, w) and what is above it (B, C, 2h, 2w). A program
owns a tile of ROWS x COLUMNS base pixels and the 2x2 pixels above each. Neighbours in a row of a
tile are neighbours in memory, so that 16 bytes are read at once:

                            rows run over    columns run over
    planar images (NCHW)    (b, h, c)        w
    others                  (b, h, w)        c

`own_tile` returns a tile as (b, c, h, w, exists, above, exists_above). The indices are (ROWS, 1) or
(1, COLUMNS), the masks (ROWS, COLUMNS) and (ROWS, 2 * COLUMNS). `above` are the columns 2w, 2w + 1
above those of a planar tile, in one row (1, 2 * COLUMNS):

    above   | 2w | 2w + 1 | 2w + 2 | 2w + 3 |   a pair for each base pixel, (ROWS, COLUMNS, 2)
    base    |      w      |      w + 1      |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, widen
from .launch import launch, power_of_2, tiles


class Image(NamedTuple):
    """An image is its memory and strides; tokens of patches have those from patch to patch."""

    ptr: Any
    batch: int
    channel: int
    row: int
    column: int
    pixel: int = 0  # from pixel to pixel inside a patch


def image(x: Tensor | None) -> Image | None:
    """Return x (B, C, H, W) as an Image, None for None."""
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
    chunk: int  # pixels side by side that a thread owns; 1 where such chunks do not fill a row
    warps: int
    count: int

    @classmethod
    def of(cls, images: Sequence[Tensor], scale: int, bilinear: bool = False) -> ImageTile:
        """Make tiles for images of one shape; a pixel of a tile is scale x scale of theirs.

        A thread owns what it reads in 16 bytes of a row, and a block has up to 128 threads. In the
        bilinear mode a thread holds the neighbours of its pixels too. Where its pixels lie side by
        side most neighbours are among them. Elsewhere it owns 8 bytes, so that registers suffice.
        """
        batch, channels, *sides = images[0].shape
        height, width = (side // scale for side in sides)
        planar = all(x.stride(3) == 1 for x in images)
        inner, wide = (channels, width) if planar else (width, channels)
        high = batch * height * inner
        a_thread = max(1, 16 // images[0].element_size() // (scale if planar else 1))
        chunk = a_thread if planar and width % a_thread == 0 else 1
        if bilinear and chunk == 1:
            a_thread = max(1, a_thread // 2)
        columns = min(power_of_2(wide), 128)
        rows = min(power_of_2(high), max(1, 128 * a_thread // columns))
        warps = max(1, rows * columns // a_thread // 32)
        count = tiles(high, wide, rows, columns)
        return cls((batch, channels, height, width), planar, rows, columns, chunk, warps, count)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of kernels that `own_tile` takes."""
        return {
            "extent": self.extent,
            "PLANAR": self.planar,
            "ROWS": self.rows,
            "COLUMNS": self.columns,
        }


def launch_tiles(kernel: Any, above: Sequence[Tensor], mode: str, **arguments: Any) -> None:
    """Start a kernel on tiles of the base pixels under the images ``above`` (B, C, 2h, 2w).

    It gets the arguments extent, CHUNK, PLANAR, ROWS and COLUMNS besides ``arguments``. CHUNK is 0
    where the mode is nearest.
    """
    bilinear = mode == "bilinear"
    tile = ImageTile.of(above, 2, bilinear)
    launch(
        kernel,
        above[0].device,
        tile.count,
        **arguments,
        **tile.arguments(),
        CHUNK=tile.chunk if bilinear else 0,
        warps=tile.warps,
    )


@triton.jit
def own_tile(extent, PLANAR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return this program's tile of base pixels, extent = (B, C, h, w), as described above."""
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
    """Return where the pixel (b, c, y, x) lies, in an image or in tokens of patches."""
    place = image.ptr + b.to(tl.int64) * image.batch + c.to(tl.int64) * image.channel
    if PATCH > 1:
        place += (y % PATCH * PATCH + x % PATCH).to(tl.int64) * image.pixel
        y, x = y // PATCH, x // PATCH
    return place + y.to(tl.int64) * image.row + x.to(tl.int64) * image.column


@triton.jit
def load_pixel(image, tile, y, x, PATCH: tl.constexpr = 1):
    """Return the pixels (y, x), one for each of the tile's: (ROWS, COLUMNS)."""
    b, c, _, _, exists, _, _ = tile
    return widen(tl.load(address(image, b, c, y, x, PATCH), mask=exists))


@triton.jit
def store_pixel(image, tile, value):
    """Write a value (ROWS, COLUMNS) to the tile's own pixels."""
    b, c, h, w, exists, _, _ = tile
    tl.store(address(image, b, c, h, w), narrow(value, image.ptr.dtype.element_ty), mask=exists)


@triton.jit
def load_pair(image, tile, y, PLANAR: tl.constexpr, PATCH: tl.constexpr = 1):
    """Return the two pixels of row y above each of the tile's: (ROWS, COLUMNS, 2)."""
    b, c, _, w, exists, above, exists_above = tile
    if PLANAR:
        pixels = tl.load(address(image, b, c, y, above, PATCH), mask=exists_above)
        return widen(tl.reshape(pixels, (exists.shape[0], exists.shape[1], 2)))
    else:
        left = tl.load(address(image, b, c, y, 2 * w, PATCH), mask=exists)
        right = tl.load(address(image, b, c, y, 2 * w + 1, PATCH), mask=exists)
        return widen(tl.join(left, right))


@triton.jit
def store_pair(image, tile, y, pair, PLANAR: tl.constexpr):
    """Write two pixels (ROWS, COLUMNS, 2) to row y above each of the tile's own."""
    b, c, _, w, exists, above, exists_above = tile
    pair = narrow(pair, image.ptr.dtype.element_ty)
    if PLANAR:
        pixels = tl.reshape(pair, (exists.shape[0], 2 * exists.shape[1]))
        tl.store(address(image, b, c, y, above), pixels, mask=exists_above)
    else:
        left, right = tl.split(pair)
        tl.store(address(image, b, c, y, 2 * w), left, mask=exists)
        tl.store(address(image, b, c, y, 2 * w + 1), right, mask=exists)


@triton.jit
def nearest(i, size):
    """Return the index nearest to i that exists."""
    return tl.minimum(tl.maximum(i, 0), size - 1)
