"""A folder of images with one subfolder a class, decoded on demand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from .dataset import ImageData, UnreadableImage, from_uint8, missing

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MODES = {1: "L", 3: "RGB"}


class ImageFolder(ImageData):
    """``root/<class>/<image>``; classes are the subfolders in alphabetical order.

    An image goes to a split by the hash of ``<class>/<image>``: 80 % train, 10 % features, 10 %
    test, whatever other files there are. It is resized, up or down, until it just covers (height,
    width), and centre-cropped. Transparency is dropped; the camera's orientation tag is followed.
    Empty files are in no split.
    """

    def __init__(self, root: Path, split: str, image_size: tuple[int, int], channels: int) -> None:
        if channels not in MODES:
            raise ValueError(f"data: images have 1 (grey) or 3 (RGB) channels, got {channels}")
        try:
            import PIL.Image  # noqa: F401
        except ImportError:
            raise missing("Pillow", f"data {str(root)!r}") from None
        self._size, self._mode = (image_size[1], image_size[0]), MODES[channels]
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise ValueError(
                f"data: {root} has no subfolders; make one a class, with images inside"
            )
        self.class_names = tuple(folder.name for folder in folders)
        self.paths: list[Path] = []
        labels: list[int] = []
        self.files = {}
        for label, folder in enumerate(folders):
            paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
            if not paths:
                raise ValueError(f"data: {folder} holds no image ({', '.join(sorted(SUFFIXES))})")
            sizes = {path: path.stat().st_size for path in paths}
            self.files |= {f"{folder.name}/{path.name}": size for path, size in sizes.items()}
            # Copies that broke off leave empty files. They would be met late, or in no training.
            chosen = [path for path in paths if sizes[path] and split_of(path) == split]
            self.paths += chosen
            labels += [label] * len(chosen)
        if not self.paths:
            raise ValueError(
                f"data: {root} has too few images: none falls into the {split} split; "
                "the split is 80/10/10, so give about 100 or more"
            )
        self.labels = torch.tensor(labels)
        self.empty_files = tuple(str(root / name) for name, size in self.files.items() if not size)

    def images(self, indices: Tensor) -> Tensor:
        return torch.stack([self._decode(i) for i in indices.tolist()])

    def _decode(self, index: int) -> Tensor:
        import numpy as np
        from PIL import Image, ImageOps

        path = self.paths[index]
        try:
            with Image.open(path) as file:
                if file.mode.startswith(("I", "F")):
                    raise ValueError(f"only 8-bit images, not mode {file.mode}")
                image = ImageOps.exif_transpose(file).convert(self._mode)
        except Exception as error:  # Pillow's decoders raise whatever the broken file leads them to
            reason = str(error).replace(f" {str(path)!r}", "")
            raise UnreadableImage(f"{path}: {reason}", index) from None
        pixels = np.array(ImageOps.fit(image, self._size, Image.Resampling.BICUBIC))
        return from_uint8(torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).movedim(-1, 0))


def split_of(path: Path) -> str:
    """Return the split of ``<class>/<image>``, by hash."""
    tenth = hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest()[0] * 10 // 256
    return {8: "features", 9: "test"}.get(tenth, "train")
