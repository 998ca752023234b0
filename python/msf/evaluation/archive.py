"""The npz files in which ADM (Dhariwal and Nichol 2021) and its successors exchange images.

arr_0 (N, H, W, 3) uint8 are images; mu (2048,), sigma (2048, 2048), and mu_s and sigma_s of the
2,023 spatial features, are statistics of what may be more images than those.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ..files import checksum
from .inception import POOL_DIM, SPATIAL_DIM
from .metrics import Gaussian

IMAGES = "arr_0"
ASYMMETRY = 1e-5  # of a covariance's largest number: more than float32 leaves
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Archive:
    """An Archive is an npz file, of which images are read a batch at a time.

    ``shape`` (N, H, W, 3) is that of its images, None where there are none. ``pool`` and
    ``spatial`` are the Gaussians of its statistics, or None. Raise ValueError, one line, for a file
    that is none of the kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as archive:
            files = map(Path, archive.namelist())
            self.names = {str(file.with_suffix("")) for file in files if file.suffix == ".npy"}
        self.pool = self._gaussian("mu", "sigma", POOL_DIM)
        self.spatial = self._gaussian("mu_s", "sigma_s", SPATIAL_DIM)
        self.shape = self._image_shape() if IMAGES in self.names else None
        if self.shape is None and self.pool is None:
            found = ", ".join(sorted(self.names)) or "nothing"
            raise ValueError(
                f"{path}: must hold images ({IMAGES}) or statistics (mu, sigma), holds {found}"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return self.shape[0] if self.shape else 0

    @cached_property
    def sha256(self) -> str:
        return checksum(self.path)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield images (B, 3, H, W) uint8, in order. Raise ValueError where they are cut off or
        damaged."""
        assert self.shape is not None
        count, *shape = self.shape
        with self._member(IMAGES) as file:
            _header(file)
            for start in range(0, count, size):
                n = min(size, count - start)
                pixels = _read(file, n * math.prod(shape))
                images = torch.frombuffer(pixels, dtype=torch.uint8).view(n, *shape)
                yield images.permute(0, 3, 1, 2)
            file.read(1)  # at its end a member's checksum is compared

    def _image_shape(self) -> tuple[int, ...]:
        with self._member(IMAGES) as file:
            shape, column_major, dtype = _header(file)
        if dtype != np.uint8 or column_major or len(shape) != 4 or shape[3] != 3:
            order = ", column by column" if column_major else ""
            raise ValueError(
                f"{self.path}: {IMAGES} must be (N, H, W, 3) uint8, got {shape} {dtype}{order}"
            )
        if 0 in shape:
            raise ValueError(f"{self.path}: {IMAGES} holds no images, its shape is {shape}")
        return shape

    def _gaussian(self, mean: str, covariance: str, dim: int) -> Gaussian | None:
        if not {mean, covariance} <= self.names:
            return None
        found = Gaussian(self._statistics(mean, (dim,)), self._statistics(covariance, (dim, dim)))
        matrix = found.covariance
        if (matrix - matrix.T).abs().max() > ASYMMETRY * matrix.abs().max():
            raise ValueError(f"{self.path}: {covariance} must be symmetric, as a covariance is")
        if (variance := matrix.diagonal().min()) < 0:
            raise ValueError(
                f"{self.path}: {covariance} must hold variances on its diagonal, got {variance:g}"
            )
        return found

    def _statistics(self, name: str, right: tuple[int, ...]) -> Tensor:
        """Return the array called ``name``, whose shape is to be ``right``, in float64."""
        with self._member(name) as file:
            shape, _, dtype = _header(file)
            fits = shape == right and dtype.kind == "f"
            data = _read(file, math.prod(shape) * dtype.itemsize) if fits else bytearray()
        values = np.frombuffer(data, dtype if fits else np.uint8)
        if not fits or not np.isfinite(values).all():
            raise ValueError(
                f"{self.path}: {name} must be {right}, finite floats, got {shape} {dtype}; "
                "statistics must be those of FID's Inception"
            )
        return torch.from_numpy(values.astype(np.float64)).view(shape)

    @contextmanager
    def _member(self, name: str) -> Iterator[IO[bytes]]:
        with self._opened() as archive, archive.open(f"{name}.npy") as file:
            yield file

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        # numpy's are ValueErrors, an encrypted file's is a RuntimeError.
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.path}: not a readable npz file ({error})") from None


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an array: its shape, whether it goes column by column, its dtype."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"version {version} of an array")
    return HEADERS[version](file)


def _read(file: IO[bytes], length: int) -> bytearray:
    data = bytearray(file.read(length))
    if len(data) < length:
        raise EOFError("it ends before its arrays do")
    return data
