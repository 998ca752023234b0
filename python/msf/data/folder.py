"""A folder of images with one subfolder a class, decoded on demand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ..files import printable
from .dataset import ImageData, UnreadableImage
from .decode import check_pillow, decode, problem_of
from .listing import ignored, list_images
from .names import Names
from .splits import HOLDOUT, check_not_empty, hash_of, in_split

MODES = {1: "L", 3: "RGB"}


class ImageFolder(ImageData):
    """An ImageFolder reads ``root/<class>/<image>``. Classes are the subfolders in alphabetical
    order, with whatever lies in folders inside them. Without subfolders ``root``'s own images are
    all of one class, which is for models without classes.

    An image goes to a split by the hash of ``<class>/<image>``, whatever other files there are:
    ``holdout`` says how many are not for training, half of them for features and half for test. It
    is resized, up or down, until it just covers (height, width), and centre-cropped. What is
    transparent shows white; the camera's orientation tag is followed. Empty files are in no split.
    """

    on_disk = True

    def __init__(
        self,
        root: Path,
        split: str,
        image_size: tuple[int, int],
        channels: int,
        num_classes: int = 0,
        holdout: float = HOLDOUT,
    ) -> None:
        if channels not in MODES:
            raise ValueError(
                f"data: images have 1 (grey) or 3 (RGB) channels, the model takes {channels}; "
                "msf encode makes latents of them"
            )
        check_pillow(root)
        self._root = root
        self._size, self._mode = (image_size[1], image_size[0]), MODES[channels]
        folders, self.files, self.left_out = list_images(root)
        if num_classes and not folders:
            raise ValueError(
                f"data: {printable(root)} has no subfolders, the model {num_classes} classes; make "
                "one a class, with images inside, or train with num_classes set to 0"
                f"{ignored(self.left_out)}"
            )
        self.has_classes = bool(folders)
        self.class_names = tuple(folders or ["all"])
        self._holdout = holdout
        # Copies that broke off leave empty files. They would be met late, or in no training.
        self.empty_files = tuple(
            printable(root / name) for name, size in self.files.items() if not size
        )
        self._choose(split)

    def _choose(self, split: str) -> None:
        self.split = split
        names = [name for name, size in self.files.items() if size]
        mine = in_split(torch.tensor(list(map(hash_of, names))), split, self._holdout)
        chosen = [name for name, is_mine in zip(names, mine.tolist()) if is_mine]
        check_not_empty(self._root, len(chosen), split, self._holdout)
        self.names = Names(chosen)
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.labels = torch.tensor(
            [numbers[name.split("/")[0]] if self.has_classes else 0 for name in chosen]
        )

    @property
    def paths(self) -> list[Path]:
        """Return the paths of all images of the split, made anew."""
        return [self._root / name for name in self.names]

    def digest(self, name: str) -> str:
        try:
            return hashlib.sha256((self._root / name).read_bytes()).hexdigest()[:16]
        except OSError:
            return ""

    def read(self, indices: Tensor) -> Tensor:
        return torch.stack([self._decode(i) for i in indices.tolist()])

    def _decode(self, index: int) -> Tensor:
        path = self._root / self.names[index]
        try:
            return decode(path, self._mode, self._size)
        except Exception as error:  # Pillow's decoders raise whatever the broken file leads them to
            raise UnreadableImage(problem_of(path, error), index) from None
