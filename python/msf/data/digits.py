"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, ten classes."""

from __future__ import annotations

import torch
from torch import Tensor

from .dataset import ImageData, missing

# The k-th image of a class goes where k modulo 10 says.
FOLDS = {"train": (0, 2, 4, 6, 8, 9), "features": (1, 5), "test": (3, 7)}


class Digits(ImageData):
    """Three fifths of every class are for training (1,077 images), a fifth is for the feature
    network (362) and a fifth the reference (358). Grey levels 0..16 become [-1, 1].

    N training images drawn with replacement are expected to have a Frechet distance from n others
    of 1 + n / 2N times the floor: 1.17 here, 1.30 with half of all for training and 534 for
    reference. A generator that learns from them is hardly closer.
    """

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str, image_size: tuple[int, int], channels: int) -> None:
        if tuple(image_size) != (8, 8) or channels != 1:
            raise ValueError(
                "data: digits are 8x8 with 1 channel, got "
                f"{image_size[0]}x{image_size[1]} with {channels} channels"
            )
        self._choose(split)

    def _choose(self, split: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise missing("scikit-learn", "data 'digits'") from None
        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()
        rank = (labels == labels[:, None]).tril(-1).sum(1)
        self.indices = torch.isin(rank % 10, torch.tensor(FOLDS[split])).nonzero().flatten()
        self.labels = labels[self.indices]
        pixels = torch.from_numpy(digits.images).float()[self.indices, None]
        self._images = pixels / 8 - 1

    def read(self, indices: Tensor) -> Tensor:
        return self._images[indices]
