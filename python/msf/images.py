"""Images as files: tensors in [-1, 1] to 8-bit PNG, one by one or as a grid."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .files import atomic_write
from .model import MSF


def to_uint8(x: Tensor) -> Tensor:
    """Map [-1, 1] to 0..255, clamped and rounded to nearest; any shape."""
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def save_image(path: str | os.PathLike[str], x: Tensor) -> None:
    """Write x (C, H, W), C 1 or 3, in [-1, 1], in the format that ``path`` names."""
    from PIL import Image

    if x.dim() != 3 or x.shape[0] not in (1, 3):
        raise ValueError(
            f"save_image: x must be (1 or 3, H, W), got {tuple(x.shape)}; decode latents first"
        )
    if not x.isfinite().all():
        raise ValueError("save_image: x must be finite, but holds NaN or infinity")
    pixels = to_uint8(x).permute(1, 2, 0).squeeze(-1).cpu().numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary)


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


def component_grid(model: MSF, components: Sequence[Tensor], *, zoom: int | None = None) -> Tensor:
    """Lay base, residuals and the merged image side by side, a block of images each: (C, h, w) in
    [-1, 1].

    Components are in data units, as ``sample_components`` gives them. Residuals are
    shown around grey, two standard deviations wide.
    """
    pyramid, merged = model.pyramid, model.pyramid.merge(components)
    size = (merged.shape[2], merged.shape[3])
    blocks = [components[0]]
    for i, residual in enumerate(components[1:], start=1):
        blocks.append(residual / (2 * pyramid.std[i, :, None, None]))
    if len(components) > 1:
        blocks.append(merged)
    zoom = zoom or max(1, 32 // max(size))
    tiles = []
    for block in blocks:
        block = block.detach().cpu()
        block = F.interpolate(block, scale_factor=size[0] // block.shape[2], mode="nearest")
        tiles.append(F.pad(tile(block, zoom=zoom), (0, 4 * zoom), value=1.0))
    return torch.cat(tiles, dim=2)
