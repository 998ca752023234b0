"""What every data source looks like from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "features", "test")


class ImageData(Dataset[tuple[Tensor, int]], ABC):
    """Images (C, H, W), float32 in [-1, 1], with a class each.

    ``labels`` (N,) int64 on the CPU index ``class_names``.
    """

    class_names: tuple[str, ...]
    labels: Tensor

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """Return images (B, C, H, W) at ``indices`` (B,) int64."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return (images (B, C, H, W) float32, labels (B,) int64) at ``indices`` (B,) int64."""
        return self.images(indices), self.labels[indices]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(torch.tensor([range(len(self))[index]]))
        return images[0], int(labels[0])


def from_uint8(pixels: Tensor) -> Tensor:
    """Map 0..255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def missing(package: str, purpose: str) -> ImportError:
    return ImportError(f"{purpose} needs {package}; run in the checkout: pip install '.[train]'")
