"""The decoding of image files to pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .dataset import from_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow runs Ghostscript for another
BACKGROUND = "white"  # what shows through where an image is transparent


def decode(path: Path, mode: str, size: tuple[int, int]) -> Tensor:
    """Return the image in ``path``, of several frames the first, as (C, H, W) in [-1, 1].

    ``mode`` is Pillow's, "L" or "RGB"; ``size`` is (width, height). Raises whatever a file that is
    broken leads Pillow to, ValueError where it has more than 8 bits.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with opened(path) as file:
        image = opaque(upright(file)).convert(mode)
    pixels = np.array(ImageOps.fit(image, size, Image.Resampling.BICUBIC))
    return from_uint8(torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).movedim(-1, 0))


@contextmanager
def opened(path: Path) -> Iterator[Image]:
    """Open an image, whatever its suffix says. Raises ValueError where it has more than 8 bits."""
    from PIL import Image

    with Image.open(path, formats=FORMATS) as file:
        if file.mode.startswith(("I", "F")):
            raise ValueError(f"only 8-bit images are, not mode {file.mode}")
        yield file


def upright(image: Image) -> Image:
    """Return the image as its orientation tag says, if that can be read. Raise what damaged pixels
    lead Pillow to."""
    from PIL import ImageOps

    image.load()  # not below: what then failed to load counts as loaded, black where it is damaged
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def opaque(image: Image) -> Image:
    """Return the image on the background, where it is transparent at all."""
    from PIL import Image

    if not image.mode.lower().endswith("a") and "transparency" not in image.info:
        return image
    if image.mode == "La":  # which converts to nothing else
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
