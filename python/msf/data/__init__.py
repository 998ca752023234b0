"""Labelled images for training and evaluation: ``load_data`` and what it returns."""

from __future__ import annotations

from pathlib import Path

from ..modes import own_modes
from ..parsing import parse, parse_number
from .dataset import ImageData, UnreadableImage
from .digits import Digits
from .folder import ImageFolder
from .latent_index import is_latents
from .latents import Latents
from .splits import HOLDOUT, SPLITS
from .textures import Textures

__all__ = [
    "HOLDOUT",
    "SPLITS",
    "Digits",
    "ImageData",
    "ImageFolder",
    "Latents",
    "Textures",
    "UnreadableImage",
    "is_latents",
    "load_data",
]


@own_modes()
def load_data(
    source: str,
    *,
    split: str,
    image_size: tuple[int, int],
    channels: int,
    num_classes: int = 0,
    flip: bool = False,
    holdout: float = HOLDOUT,
) -> ImageData:
    """Load one split of ``"digits"``, ``"textures"`` or a folder with one subfolder a class, or
    with images only, or of the latents that ``msf encode`` made of one.

    ``split`` is "train" (for the generator), "features" (for the evaluation's feature network) or
    "test" (the evaluation's reference). The three share no image and, for textures, no pixel; they
    are the same on every machine and in every run. ``image_size`` is (height, width), of latents
    their own, ``num_classes`` how many classes there must be, 0 for any number. With ``flip`` half
    of what is drawn at random is mirrored. ``holdout`` is how much of a folder is not for training,
    in equal parts for the other two splits.

    Raises ValueError with one line for whatever the source cannot give, ImportError where the
    source needs a package of the ``train`` extra.
    """
    if split not in SPLITS:
        raise ValueError(f"data: split must be one of {', '.join(SPLITS)}, got {split!r}")
    image_size = parse(image_size, tuple[int, int], "data: image_size")
    if min(image_size) < 1:
        raise ValueError(
            f"data: image_size must be (height, width), both positive, got {image_size}"
        )
    if not 0 <= parse_number(holdout, "data: holdout") < 1:
        raise ValueError(f"data: holdout must be in [0, 1), got {holdout}")
    if not holdout and split != "train" and source not in ("digits", "textures"):
        raise ValueError(
            f"data: nothing of {source} is held out (holdout 0), so its {split} split is empty; "
            f"train with a holdout, as {HOLDOUT}"
        )
    data = _open(source, split, image_size, channels, num_classes, holdout)
    if num_classes not in (0, data.num_classes):
        raise ValueError(
            f"data: {source} has {data.num_classes} classes, the model {num_classes}; choose other "
            f"data, or train with num_classes set to {data.num_classes}, or 0 for no labels"
        )
    data.flip = flip
    return data


def _open(
    source: str,
    split: str,
    image_size: tuple[int, int],
    channels: int,
    num_classes: int,
    holdout: float,
) -> ImageData:
    if source in ("digits", "textures"):
        if holdout != HOLDOUT:
            raise ValueError(f"data: {source} has splits of its own; leave out the holdout")
        kind = Digits if source == "digits" else Textures
        return kind(split, image_size, channels)
    if not Path(source).is_dir():
        raise ValueError(f"data: {source!r} is neither 'digits', 'textures' nor an existing folder")
    if is_latents(source):
        return Latents(Path(source), split, image_size, channels, holdout)
    return ImageFolder(Path(source), split, image_size, channels, num_classes, holdout)
