"""Crops of scikit-image's brick, grass and gravel: 512x512 grey, CC0, inside the wheel."""

from __future__ import annotations

import torch
from torch import Tensor

from .dataset import ImageData, from_uint8, missing

# Each split has some of the 512 columns. No pixel is in two of them.
COLUMNS = {"train": (0, 230), "features": (230, 307), "test": (307, 512)}


class Textures(ImageData):
    """Textures are the crops at every position of the split's columns, sliced on demand.

    Training crops lie 1 pixel apart (95,719 a class at 32x32), those of the feature network 4
    pixels apart, and those of the reference side by side without overlap (96 a class at 32x32, 384
    at 16x16): overlapping ones would count as more evidence than they are.
    """

    class_names = ("brick", "grass", "gravel")

    def __init__(self, split: str, image_size: tuple[int, int], channels: int) -> None:
        self._size, self._channels = image_size, channels
        self._choose(split)

    def _choose(self, split: str) -> None:
        try:
            from skimage import data
        except ImportError:
            raise missing("scikit-image", "data 'textures'") from None
        left, right = COLUMNS[split]
        height, width = self._size
        if self._channels != 1 or height > 512 or width > right - left:
            raise ValueError(
                f"data: textures have 1 channel and crops of at most 512x{right - left} in the "
                f"{split} split, got {height}x{width} with {self._channels} channels"
            )
        textures = [torch.from_numpy(getattr(data, name)().copy()) for name in self.class_names]
        self._textures = from_uint8(torch.stack(textures))[:, :, left:right]
        steps = {"train": (1, 1), "features": (4, 4), "test": (height, width)}[split]
        rows = torch.arange(0, 512 - height + 1, steps[0])
        columns = torch.arange(0, right - left - width + 1, steps[1])
        # (N, 3): class, top row and left column of every crop, class by class.
        self._corners = torch.cartesian_prod(torch.arange(len(textures)), rows, columns)
        self._window = torch.arange(height)[:, None], torch.arange(width)
        self.labels = self._corners[:, 0].contiguous()

    def read(self, indices: Tensor) -> Tensor:
        texture, row, column = self._corners[indices].T[:, :, None, None]
        y, x = self._window
        return self._textures[texture, row + y, column + x][:, None]
