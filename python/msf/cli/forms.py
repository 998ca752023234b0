"""What ``msf sample`` writes: how a batch is kept, and what is made of all batches at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_write
from ..images import component_grid, png, tile, to_uint8
from ..parts import Arrays, write_npz
from . import outputs

if TYPE_CHECKING:
    from ..model import MSF
    from ..sampling import Sample


class Form(Protocol):
    """A Form is a kind of output."""

    def part(self, made: Sample, first: int) -> Arrays:
        """Return what is kept of a batch, whose first image is the one at index ``first``."""

    def write(self, path: Path, parts: Iterator[Arrays]) -> None:
        """Write all parts as ``path``."""


@dataclass(frozen=True)
class Npz:
    """An Npz is the file that evaluations of ADM take: arr_0 (N, H, W, 3) uint8, of a grey model
    three equal channels, and arr_1, the ``labels`` (N,) int64, where there are classes."""

    count: int
    labels: Tensor | None

    def part(self, made: Sample, first: int) -> Arrays:
        pixels = to_uint8(made.images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        return {"arr_0": pixels.contiguous().numpy()}

    def write(self, path: Path, parts: Iterator[Arrays]) -> None:
        pixels = (part["arr_0"] for part in parts)
        labels = {} if self.labels is None else {"arr_1": (self.count, [self.labels.numpy()])}
        write_npz(path, {"arr_0": (self.count, pixels), **labels})


class Folder:
    """A Folder has one PNG an image, named by its index."""

    names = r"\d{6,}\.png"

    def part(self, made: Sample, first: int) -> Arrays:
        named = enumerate(made.images, start=first)
        return {f"{i:06d}": np.frombuffer(png(image), dtype=np.uint8) for i, image in named}

    def write(self, path: Path, parts: Iterator[Arrays]) -> None:
        with outputs.atomic_folder(path) as folder:
            for part in parts:
                for name, content in part.items():
                    (folder / f"{name}.png").write_bytes(content.tobytes())


@dataclass(frozen=True)
class Grid:
    """A Grid is one picture: base, residuals and the merged image side by side, or, without a
    ``model`` in whose units they are, the images."""

    model: MSF | None

    def part(self, made: Sample, first: int) -> Arrays:
        kept = made.components if self.model else [made.images]
        return {str(i): x.numpy() for i, x in enumerate(kept)}

    def write(self, path: Path, parts: Iterator[Arrays]) -> None:
        columns = zip(*(part.values() for part in parts), strict=True)
        kept = [torch.from_numpy(np.concatenate(column)) for column in columns]
        grid = component_grid(self.model.cpu(), kept) if self.model else tile(kept[0])
        with atomic_write(path) as temporary:
            temporary.write_bytes(png(grid))


class Tensors:
    """A Tensors is a .safetensors file with the tensor "images" (N, C, H, W) float32."""

    def part(self, made: Sample, first: int) -> Arrays:
        return {"images": made.images.numpy()}

    def write(self, path: Path, parts: Iterator[Arrays]) -> None:
        images = torch.from_numpy(np.concatenate([part["images"] for part in parts]))
        with atomic_write(path) as temporary:
            save_file({"images": images}, temporary)
