"""The decoding of image files to pixels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files import printable
from .dataset import from_uint8, missing
from .metadata import without_metadata

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow runs Ghostscript for another
BACKGROUND = "white"  # what shows through where an image is transparent


def check_pillow(source: Path) -> None:
    """Raise ImportError unless what decodes the images in ``source`` is installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise missing("Pillow", f"data {str(source)!r}") from None


def problem_of(path: Path, error: Exception) -> str:
    """Return a line that names an image and says why it cannot be read, from what Pillow raised."""
    reason = str(error).replace(f" {str(path)!r}", "")
    return f"{printable(path)}: {reason}"


def decode(path: Path, mode: str, size: tuple[int, int]) -> Tensor:
    """Return the image in ``path``, of several frames the first, as (C, H, W) in [-1, 1]: resized
    until it just covers ``size``, (width, height), and cropped at the centre.

    ``mode`` is Pillow's, "L" or "RGB". Raises whatever a file that is broken leads Pillow to,
    ValueError where it has more than 8 bits.
    """
    from PIL import Image, ImageOps

    return from_uint8(
        pixels(path, mode, lambda image: ImageOps.fit(image, size, Image.Resampling.BICUBIC))
    )


def pixels(path: Path, mode: str, crop: Callable[[Image], Image]) -> Tensor:
    """Return what ``crop`` makes of the image in ``path`` as (C, H, W) uint8; else as ``decode``
    does."""
    import numpy as np

    values = np.array(crop(opaque(loaded(path)).convert(mode)))
    return torch.from_numpy(values).reshape(*values.shape[:2], -1).movedim(-1, 0)


def centre_crop(image: Image, size: int) -> Image:
    """Return the centre of an image as ADM (arXiv 2105.05233) and DiT crop theirs, ``size``
    squared.

    The shorter side is halved by averages while it stays at least ``size``, then brought to it by
    bicubic interpolation; the longer one loses as much at either end, of an odd pixel the last.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def loaded(path: Path) -> Image:
    """Return the image in ``path``, whatever its suffix says, as its orientation tag says. Damaged
    metadata of PNG and JPEG is left out. Raises ValueError where it has more than 8 bits."""
    try:
        return _loaded(path)
    except Exception:  # Pillow's decoders raise whatever the broken file leads them to
        content = path.read_bytes()
        pixels = without_metadata(content)
        if pixels != content:
            with suppress(Exception):
                return _loaded(BytesIO(pixels))
        raise


def _loaded(source: Path | BytesIO) -> Image:
    from PIL import Image

    with Image.open(source, formats=FORMATS) as file:
        if file.mode.startswith(("I", "F")):
            raise ValueError(f"only 8-bit images are, not mode {file.mode}")
        return upright(file)


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
