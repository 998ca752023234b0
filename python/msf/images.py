"""Images as files: tensors in [-1, 1] to 8-bit PNG, one by one or as a grid."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_real
from .files import atomic_write
from .model import MSF

if TYPE_CHECKING:
    from PIL import Image


def to_uint8(x: Tensor) -> Tensor:
    """Map [-1, 1] to 0..255, clamped and rounded to nearest; any shape. Raise ValueError unless x
    is finite, TypeError unless it is of real numbers."""
    check_real(x, "to_uint8: x must be a tensor")
    if not x.isfinite().all():
        raise ValueError("to_uint8: x must be finite, but holds NaN or infinity")
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_pil(x: Tensor) -> Image.Image:
    """Return x (C, H, W), C 1 or 3, in [-1, 1], as PIL's image of 8 bits."""
    from PIL import Image

    if x.dim() != 3 or x.shape[0] not in (1, 3):
        raise ValueError(
            f"an image must be (1 or 3, H, W), got {tuple(x.shape)}; decode latents first"
        )
    return Image.fromarray(to_uint8(x).permute(1, 2, 0).squeeze(-1).cpu().numpy())


def save_image(path: str | os.PathLike[str], x: Tensor) -> None:
    """Write x (C, H, W), C 1 or 3, in [-1, 1], in the format that ``path`` names."""
    picture = to_pil(x)
    with atomic_write(path) as temporary:
        picture.save(temporary)


def png(x: Tensor) -> bytes:
    """Return x (C, H, W), C 1 or 3, in [-1, 1], as the content of a PNG file."""
    content = io.BytesIO()
    to_pil(x).save(content, "PNG")
    return content.getvalue()


def tile(x: Tensor, columns: int | None = None, *, zoom: int = 1) -> Tensor:
    """Tile x (B, C, H, W) into one image (C, h, w), ``columns`` a row, pixels enlarged ``zoom``
    times, with white gaps."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    x = F.interpolate(x.float(), scale_factor=zoom, mode="nearest")
    x = F.pad(x, (0, zoom, 0, zoom), value=1.0)
    missing = -len(x) % columns
    x = torch.cat([x, x.new_ones(missing, *x.shape[1:])])
    rows = x.unflatten(0, (-1, columns))
    return rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def titled(x: Tensor, title: str) -> Tensor:
    """Put a line of black words above x (C, h, w), which gets white at its right where they are
    wider."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    width, bottom = math.ceil(font.getbbox(title)[2]), math.ceil(font.getbbox("g")[3])
    line = Image.new("L", (max(x.shape[2], width), bottom + 3), 255)
    ImageDraw.Draw(line).text((0, 0), title, fill=0, font=font)
    words = torch.from_numpy(np.array(line))[None] / 127.5 - 1
    x = F.pad(x, (0, line.width - x.shape[2]), value=1.0)
    return torch.cat([words.expand(len(x), -1, -1), x], dim=1)


def component_grid(model: MSF, components: Sequence[Tensor], *, zoom: int | None = None) -> Tensor:
    """Lay base, residuals and the merged image side by side, a block of images each under its name
    and size: (C, h, w) in [-1, 1].

    Components are in data units, as ``sample_components`` gives them. Residuals are
    shown around grey, two standard deviations wide.
    """
    pyramid, merged = model.pyramid, model.pyramid.merge(components)
    size = (merged.shape[2], merged.shape[3])
    blocks = dict(zip(model.config.stage_names, components))
    for i, name in enumerate(list(blocks)[1:], start=1):
        blocks[name] = blocks[name] / (2 * pyramid.std[i, :, None, None])
    if len(components) > 1:
        blocks["merged"] = merged
    zoom = zoom or max(1, 32 // max(size))
    tiles = []
    for name, block in blocks.items():
        title = f"{name} {block.shape[2]}x{block.shape[3]}"
        block = block.detach().cpu()
        block = F.interpolate(block, scale_factor=size[0] // block.shape[2], mode="nearest")
        tiles.append(F.pad(titled(tile(block, zoom=zoom), title), (0, 4 * zoom), value=1.0))
    return torch.cat(tiles, dim=2)
