"""The files of a folder of latents.

latents.json                  what is in the folder: a ``LatentIndex``
latents-<number>.safetensors  shards of 1,024 images, with tensors
                                moments (n, 2, 2C, h, w) float16: of each image and of its mirror
                                  image the mean of the VAE's posterior, then its log-variance
                                labels (n,) int64
                                hashes (n,) int64: of the names, see ``splits``
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_write, checksum, printable, read_file
from ..parsing import check_fields, parse_dataclass, parse_object

INDEX_FILE = "latents.json"
FORMAT = 1
# 34 MB at 256 pixels: a killed process makes no more than that anew, and a damaged file costs no
# more. ImageNet has 1,252, few enough to be mapped into memory all at once.
SHARD_IMAGES = 1024


@dataclass(frozen=True)
class Shard:
    """A Shard is one file of a folder of latents."""

    name: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Vae:
    """A Vae is known by the hash of its weights' file. Models see (latent - shift_factor) *
    scaling_factor; what is stored is the latent."""

    sha256: str
    scaling_factor: float
    shift_factor: float


@dataclass(frozen=True)
class LatentIndex:
    """A LatentIndex says what a folder of latents holds.

    ``source`` is the name of the folder that was encoded, ``fingerprint`` a hash of the names and
    sizes of its ``found`` images, ``shard_images`` a shard. ``images`` of them are stored as
    ``latent_shape`` (C, h, w); those ``skipped`` could not be read. ``class_names`` is empty where
    there are no classes. Shards that are not made yet are missing in ``shards``.
    """

    format: int
    source: str
    fingerprint: str
    vae: Vae
    image_size: int
    latent_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    found: int
    shard_images: int = SHARD_IMAGES
    images: int = 0
    shards: tuple[Shard, ...] = ()
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        numbers = (self.image_size, *self.latent_shape, self.found, self.shard_images)
        if min(numbers) < 1:
            raise ValueError(f"sizes and numbers must be positive, got {numbers}")
        names = {shard_name(number) for number in range(self.shard_count)}
        for shard in self.shards:
            if shard.name not in names:
                raise ValueError(f"shards must be different ones of its own, got {shard.name!r}")
            names.remove(shard.name)
            if shard.images < 0 or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
                raise ValueError(f"the shard {shard.name} must have images and a sha256")
        if self.images != sum(shard.images for shard in self.shards):
            raise ValueError(f"images must be those of all shards, got {self.images}")

    @property
    def shard_count(self) -> int:
        return -(-self.found // self.shard_images)

    @property
    def is_complete(self) -> bool:
        return len(self.shards) == self.shard_count


def shard_name(number: int) -> str:
    return f"latents-{number:05d}.safetensors"


def is_latents(source: str | os.PathLike[str]) -> bool:
    """Return whether ``source`` is a folder of latents."""
    return (Path(source) / INDEX_FILE).exists()


def read_index(folder: Path) -> LatentIndex:
    """Return the index of a folder of latents. Raise ValueError (one line) when it is corrupt."""
    file = folder / INDEX_FILE
    values = parse_object(read_file(file), file)
    if values.get("format") != FORMAT:
        raise ValueError(f"{file}: format must be {FORMAT}, got {values.get('format')!r}")
    try:
        return parse_dataclass(LatentIndex, values, "index")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def write_index(folder: Path, index: LatentIndex) -> None:
    with atomic_write(folder / INDEX_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(index), indent=1) + "\n")


def write_shard(
    folder: Path, number: int, moments: Tensor, labels: Tensor, hashes: Tensor
) -> Shard:
    """Write a shard of n images, as the top of this module shows it, and return what the index says
    of it."""
    path = folder / shard_name(number)
    with atomic_write(path) as temporary:
        save_file({"moments": moments, "labels": labels, "hashes": hashes}, temporary)
        return Shard(path.name, len(labels), temporary.stat().st_size, checksum(temporary))


def misfit(folder: Path, shard: Shard) -> str | None:
    """Return how a shard's file is not as long as it was; None where it is."""
    path = folder / shard.name
    if not path.is_file():
        return f"{printable(path)} is missing"
    if (size := path.stat().st_size) != shard.bytes:
        return f"{printable(path)} has {size:,} bytes, not {shard.bytes:,}"
    return None


def damage(folder: Path, shard: Shard) -> str | None:
    """Return how a shard's file is not what it was; None where it is. Reads all of it."""
    if found := misfit(folder, shard):
        return found
    path = folder / shard.name
    return None if checksum(path) == shard.sha256 else f"{printable(path)} is damaged"


def check_sizes(folder: Path, shards: Iterable[Shard]) -> None:
    """Raise ValueError (one line) for the first shard that is missing or of another size."""
    for shard in shards:
        _refuse(misfit(folder, shard))


def check_bytes(folder: Path, shard: Shard) -> None:
    """Raise ValueError (one line) where a shard's file is not what it was. Reads all of it."""
    _refuse(damage(folder, shard))


def _refuse(found: str | None) -> None:
    if found:
        raise ValueError(
            f"data: {found}; restore it, or make it anew with the same msf encode command"
        )
