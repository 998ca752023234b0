"""Which images are for training: a function of the image's name and of how many are held out."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from ..files import printable

SPLITS = ("train", "features", "test")
HOLDOUT = 0.2  # the default of ``TrainingConfig`` too


def hash_of(name: str) -> int:
    """Return 32 bits of a hash of ``<class>/<image>``."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:4], "big")


def in_split(hashes: Tensor, split: str, holdout: float) -> Tensor:
    """Return which images, (N,) bool, are in ``split``, by their hashes (N,) int64.

    Of all images ``holdout`` are not for training, half of them for either other split. What a
    smaller part holds out a larger one does too.
    """
    # The tenth is that of the first byte, as it has always been; three more bytes part the tenth.
    tenth, rest = (hashes >> 24) * 10 // 256, hashes & 0xFFFFFF
    position = (tenth + rest.double() / 2**24) / 10
    starts = (0.0, 1 - holdout, 1 - holdout / 2, 1.0)
    start, end = starts[SPLITS.index(split) :][:2]
    return (position >= start) & (position < end)


def split_of(name: str, holdout: float = HOLDOUT) -> str:
    """Return the split of ``<class>/<image>``."""
    hashes = torch.tensor([hash_of(name)])
    return next(split for split in SPLITS if in_split(hashes, split, holdout))


def check_not_empty(root: Path, count: int, split: str, holdout: float) -> None:
    """Raise ValueError (one line) where none of the images in ``root`` falls into ``split``."""
    if not count:
        raise ValueError(
            f"data: {printable(root)} has too few images: none falls into the {split} split; "
            f"the split is {shares(holdout)}, so give about 100 or more"
        )


def shares(holdout: float) -> str:
    """Return the percentages of the splits, as "80/10/10"."""
    return f"{100 * (1 - holdout):g}/{50 * holdout:g}/{50 * holdout:g}"
