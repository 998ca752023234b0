"""The interface that every data source has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .listing import ignored


class UnreadableImage(ValueError):
    """An image cannot be read: ``problem`` names it and says why, ``index`` is its place."""

    def __init__(self, problem: str, index: int = -1) -> None:
        super().__init__(f"data: cannot read {problem}; replace or remove it")
        self.problem, self.index = problem, index


class ImageData(Dataset[tuple[Tensor, int]], ABC):
    """An ImageData holds images (C, H, W), float32 in [-1, 1], with a class each.

    ``labels`` (N,) int64 on the CPU index ``class_names``.
    """

    class_names: tuple[str, ...]
    labels: Tensor
    has_classes = True  # whether ``class_names`` are more than one name for all
    files: Mapping[str, int] = MappingProxyType({})  # sizes by relative name, of all splits
    empty_files: tuple[str, ...] = ()  # of all splits; they are in none
    split = ""  # which one this is, where ``files`` are of all
    on_disk = False  # whether images are read from files, which worker processes then do
    flip = False  # whether what is drawn at random is half of it mirrored
    left_out: Sequence[str] = ()  # what of the source is not read, in words

    def summary(self) -> str:
        """Return how many images there are, in how many classes."""
        images = f"{self.total:,} images in {self.num_classes:,} classes"
        if not self.has_classes:
            images = f"{self.total:,} images without classes"
        if self.split:
            images += f", {len(self):,} of them in the {self.split} split"
        return images + ignored(self.left_out)

    @property
    def total(self) -> int:
        """Return how many images the source has, in all its splits where it is of files."""
        return len(self.files) or len(self)

    def digest(self, name: str) -> str:
        """Return a hash of what the file ``name`` holds, "" where it cannot be read."""
        raise NotImplementedError(f"{type(self).__name__} has no files")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def of_split(self, split: str) -> ImageData:
        """Return the images of another split, without a second look at what the source holds. Raise
        ValueError where it has none."""
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))  # ``copy`` would leave out what workers do not need
        other._choose(split)
        return other

    def _choose(self, split: str) -> None:
        """Become the images of ``split``. Raise ValueError where the source has none."""
        raise NotImplementedError(f"{type(self).__name__} has no splits")

    @abstractmethod
    def read(self, indices: Tensor) -> Tensor:
        """Return images (B, C, H, W) at ``indices`` (B,) int64 as they are. Raise UnreadableImage
        for the first that is none."""

    def images(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images (B, C, H, W) at ``indices`` (B,) int64. Raise UnreadableImage for the first
        that is none.

        From ``generator``, if given, all is drawn that is random: with ``flip`` which half of the
        images, on average, is mirrored left to right."""
        images = self.read(indices)
        mirrored = self.mirrored(len(indices), generator)
        return images if mirrored is None else torch.where(mirrored, images.flip(-1), images)

    def mirrored(self, count: int, generator: torch.Generator | None) -> Tensor | None:
        """Draw which of ``count`` images are to be mirrored, (B, 1, 1, 1) bool; None for none."""
        if generator is None or not self.flip:
            return None
        return torch.rand(count, 1, 1, 1, generator=generator) < 0.5

    def batch(
        self, indices: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (images (B, C, H, W) float32, labels (B,) int64) at ``indices`` (B,) int64, as
        ``images`` does."""
        return self.images(indices, generator), self.labels[indices]

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker process needs: not ``files``, of which there may be millions."""
        return {name: value for name, value in vars(self).items() if name != "files"}

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(torch.tensor([range(len(self))[index]]))
        return images[0], int(labels[0])


def from_uint8(pixels: Tensor) -> Tensor:
    """Map 0..255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def missing(package: str, purpose: str) -> ImportError:
    return ImportError(f"{purpose} needs {package}; run in the checkout: pip install '.[train]'")
