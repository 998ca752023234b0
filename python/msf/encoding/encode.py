"""Images become latents: ``encode`` makes the folder that ``Latents`` reads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.dataset import from_uint8
from ..data.decode import centre_crop, check_pillow, pixels, problem_of
from ..data.latent_index import FORMAT, SHARD_IMAGES, LatentIndex, write_shard
from ..data.listing import ignored, list_images
from ..data.names import Names
from ..data.splits import hash_of
from ..files import existing, printable
from ..modes import own_modes
from ..parsing import parse_whole
from ..progress import Bar, bar, say
from ..training.batches import loader_of
from ..training.identity import fingerprint, listed
from ..training.skipped import NAMED, Skipped
from .encoded_folder import EncodedFolder
from .vae import Autoencoder, problem


@own_modes()
def encode(
    source: Path,
    vae: Path,
    size: int,
    out: Path,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    progress: bool = True,
) -> LatentIndex:
    """Encode the images of the folder ``source`` by the VAE in the folder ``vae`` into the folder
    ``out``, and return what is in that at the end. It continues where an earlier call for the same
    stopped, and makes damaged shards anew.

    An image is cropped at its centre to ``size`` squared pixels. Of ``processes`` that do this at
    the same time the one of number ``rank`` makes every shard whose number is ``rank`` modulo
    ``processes``; ``workers`` processes of each decode images. What is in ``out`` at the end does
    not depend on them, nor on a CPU on ``batch_size``, the images that go through the VAE at once.
    Raise ValueError for what does not fit, for too many unreadable images, and for latents that
    float16 cannot hold.
    """
    check_pillow(source)
    classes, files, left_out = list_images(source)
    encoder = Autoencoder(vae, device)
    index = LatentIndex(
        format=FORMAT,
        source=source.resolve().name,
        fingerprint=fingerprint(files),
        vae=encoder.vae,
        image_size=size,
        latent_shape=encoder.latent_shape(size),
        class_names=tuple(classes),
        found=len(files),
        shard_images=SHARD_IMAGES,
    )
    folder = EncodedFolder(out, index)
    sizes = _checked_sizes(folder)
    if progress and rank == 0:
        shape = "x".join(map(str, index.latent_shape))
        say(
            f"{index.found:,} images to latents of {shape}, {index.shard_count:,} shards; what is "
            f"to be made takes {sizes}{ignored(left_out)}"
        )
    folder.begin()
    todo = folder.missing(range(rank, index.shard_count, processes), shown=progress)
    images = _Images(source, files, classes, size)
    done = index.found - sum(len(_rows(index, number)) for number in todo)
    made = bar("encoding", index.found, done=done, units="images", row=rank, shown=progress)
    try:
        _Shards(folder, images, encoder, batch_size, workers).make(todo, made)
    finally:
        made.close()
    return folder.read()


def _checked_sizes(folder: EncodedFolder) -> str:
    """Return how much the latents will take, and what is free. Raise ValueError where the disk has
    less."""
    index = folder.read()
    channels, height, width = index.latent_shape
    # Two versions of mean and log-variance of two bytes a value, the label and the hash.
    bytes_an_image = 2 * 2 * channels * height * width * 2 + 16
    needed = (index.found - index.images - len(index.skipped)) * bytes_an_image
    free = shutil.disk_usage(existing(folder.path)).free
    sizes = f"{needed / 1e9:,.3g} GB, {free / 1e9:,.3g} GB are free"
    if needed > free:
        raise ValueError(f"{folder.path}: the latents take {sizes}; choose another --out")
    return sizes


def _rows(index: LatentIndex, number: int) -> range:
    """Return which of the images found are those of a shard."""
    start = number * index.shard_images
    return range(start, min(start + index.shard_images, index.found))


class _Images(Dataset):
    """_Images are the cropped ones of a folder, by their indices: (pixels (n, 3, size, size)
    uint8 of those that can be read, their indices (n,), what is wrong with the others by index)."""

    def __init__(
        self, root: Path, files: Mapping[str, int], classes: Sequence[str], size: int
    ) -> None:
        self._root, self._size, self.names = root, size, Names(files)
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = torch.tensor([numbers.get(name.split("/")[0], 0) for name in files])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, indices: range) -> tuple[Tensor, Tensor, dict[int, str]]:
        read: dict[int, Tensor] = {}
        problems = {}
        for index in indices:
            path = self.path(index)
            try:
                read[index] = pixels(path, "RGB", partial(centre_crop, size=self._size))
            except Exception as error:  # Pillow's decoders raise whatever the broken file leads to
                problems[index] = problem_of(path, error)
        images = torch.stack([*read.values()]) if read else torch.empty(0, dtype=torch.uint8)
        return images, torch.tensor([*read], dtype=torch.long), problems

    def path(self, index: int) -> Path:
        return self._root / self.names[index]


class _Shards:
    """_Shards makes shards of ``images`` in ``folder``."""

    def __init__(
        self,
        folder: EncodedFolder,
        images: _Images,
        encoder: Autoencoder,
        batch_size: int,
        workers: int,
    ) -> None:
        self.folder, self.images, self.encoder = folder, images, encoder
        self.batch_size, self.workers = parse_whole(batch_size, "encode: batch_size", 1), workers
        self.skipped = Skipped(len(images))

    def make(self, numbers: Sequence[int], progress: Bar) -> None:
        batches = self._read(numbers)
        for number in numbers:
            count = len(self._groups(number))
            parts = [self._encoded(*next(batches), progress) for _ in range(count)]
            kept = torch.cat([indices for _, indices, _ in parts])
            hashes = [hash_of(self.images.names[i]) for i in kept.tolist()]
            self.folder.read()  # raises where another's shards have come since, and saves them
            shard = write_shard(
                self.folder.path,
                number,
                torch.cat([moments for moments, _, _ in parts]),
                self.images.labels[kept],
                torch.tensor(hashes, dtype=torch.long),
            )
            lost = [self.images.names[i] for _, _, problems in parts for i in problems]
            self.folder.add(shard, lost)

    def _groups(self, number: int) -> list[range]:
        rows, size = _rows(self.folder.index, number), self.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _read(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, dict[int, str]]]:
        """Yield what ``images`` are, group by group."""
        groups = [group for number in numbers for group in self._groups(number)]
        yield from loader_of(self.images, groups, self.workers)

    def _encoded(
        self, images: Tensor, indices: Tensor, problems: dict[int, str], progress: Bar
    ) -> tuple[Tensor, Tensor, dict[int, str]]:
        """Return moments (n, 2, 2C, h, w) float16 in place of ``images``."""
        self.skipped.add(problems)
        progress.update(len(indices) + len(problems))
        if not len(indices):
            channels, *size = self.folder.index.latent_shape
            return torch.empty(0, 2, 2 * channels, *size).half(), indices, problems
        moments = self.encoder.moments(from_uint8(images))
        if why := problem(moments):
            at = next(i for i, part in zip(indices.tolist(), moments) if problem(part))
            raise ValueError(
                f"{printable(self.images.path(at))}: {why}; leave the image out or take another VAE"
            )
        return moments.half(), indices, problems


def report(index: LatentIndex) -> None:
    """Say which images were skipped, if any."""
    if index.skipped:
        say(
            f"skipped {len(index.skipped):,} of {index.found:,} images, as they cannot be read: "
            f"{listed(index.skipped, NAMED)}"
        )
