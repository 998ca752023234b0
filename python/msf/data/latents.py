"""Latents of images, encoded once by ``msf encode`` and drawn from their posterior each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import printable
from .dataset import ImageData
from .latent_index import Shard, check_bytes, check_sizes, read_index
from .splits import HOLDOUT, check_not_empty, in_split


class Latents(ImageData):
    """A Latents are the images of a folder that ``msf encode`` made, as latents (C, h, w) in a
    model's scale: (latent - shift_factor) * scaling_factor of the VAE.

    From a generator the latents are drawn, of the image or, with ``flip``, of its mirror image;
    without one they are the posterior's means. Shards are mapped into memory, each when it is first
    read, and its checksum then verified, so a process takes of them what the system's cache has
    room for. Splits are as those of the images in a folder.
    """

    on_disk = True

    def __init__(
        self,
        root: Path,
        split: str,
        image_size: tuple[int, int],
        channels: int,
        holdout: float = HOLDOUT,
    ) -> None:
        self._root, self._index = root, read_index(root)
        index, self._holdout = self._index, holdout
        if not index.is_complete:
            raise ValueError(
                f"data: {printable(root)} has {len(index.shards):,} of {index.shard_count:,} "
                "shards; finish it with the same msf encode command"
            )
        if (channels, *image_size) != index.latent_shape:
            shape = "x".join(map(str, index.latent_shape))
            wanted = "x".join(map(str, (channels, *image_size)))
            raise ValueError(
                f"data: the latents in {printable(root)} are {shape}, of images of "
                f"{index.image_size} pixels, the model takes {wanted}; train a model of "
                f"{index.latent_shape[0]} channels and image_size {list(index.latent_shape[1:])}"
            )
        check_sizes(root, index.shards)
        self.has_classes = bool(index.class_names)
        self.class_names = index.class_names or ("all",)
        self.files = {shard.name: shard.bytes for shard in index.shards}
        self._shards: dict[int, Tensor] = {}
        self._starts = torch.tensor([0, *(s.images for s in index.shards[:-1])]).cumsum(0)
        self._all_labels, self._hashes = self._labels_and_hashes()
        self._choose(split)

    def _choose(self, split: str) -> None:
        self.split = split
        self._rows = in_split(self._hashes, split, self._holdout).nonzero().flatten()
        check_not_empty(self._root, len(self._rows), split, self._holdout)
        self.labels = self._all_labels[self._rows]

    def summary(self) -> str:
        return f"latents of {super().summary()}"

    @property
    def total(self) -> int:
        return self._index.images

    def digest(self, name: str) -> str:
        """Return a hash of what the shard ``name`` should hold: reading all would take minutes."""
        return next(shard.sha256[:16] for shard in self._index.shards if shard.name == name)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_shards": {}}  # each process maps them for itself

    def read(self, indices: Tensor) -> Tensor:
        return self.images(indices)

    def images(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mirrored = self.mirrored(len(indices), generator)
        rows = self._rows[indices]
        mean, log_variance = self._moments(rows, mirrored).chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator)
            mean = mean + (0.5 * log_variance).exp() * noise
        vae = self._index.vae
        latents = (mean - vae.shift_factor) * vae.scaling_factor
        finite = latents.isfinite().flatten(1).all(1)
        if not finite.all():
            shard = self._index.shards[int(self._shard_numbers(rows[~finite])[0])]
            raise ValueError(
                f"data: {printable(self._root / shard.name)} holds NaN or infinity; remove it and "
                "make it anew with the same msf encode command"
            )
        return latents

    def _moments(self, rows: Tensor, mirrored: Tensor | None) -> Tensor:
        """Return moments (B, 2C, h, w) float32 of the images, or of their mirror images where they
        are ``mirrored`` (B, 1, 1, 1) bool; ``rows`` (B,) count images through all shards."""
        versions = torch.zeros_like(rows) if mirrored is None else mirrored.flatten().long()
        shards = self._shard_numbers(rows)
        places = zip(shards.tolist(), (rows - self._starts[shards]).tolist(), versions.tolist())
        return torch.stack([self._shard(s)[row, version] for s, row, version in places]).float()

    def _shard_numbers(self, rows: Tensor) -> Tensor:
        return torch.bucketize(rows, self._starts, right=True) - 1

    def _shard(self, number: int) -> Tensor:
        """Return the moments of a shard, mapped into memory. Raise ValueError (one line) where its
        bytes are not what they were."""
        if number not in self._shards:
            shard = self._index.shards[number]
            check_bytes(self._root, shard)  # 34 ms; to draw its 1,024 latents of 4x32x32 takes 45
            self._shards[number] = self._tensors(shard)["moments"]
        return self._shards[number]

    def _labels_and_hashes(self) -> tuple[Tensor, Tensor]:
        parts = [self._tensors(shard) for shard in self._index.shards]
        labels = torch.cat([part["labels"] for part in parts])
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"data: labels in {printable(self._root)} must be of its {self.num_classes} "
                f"classes, got {int(labels.min())} to {int(labels.max())}"
            )
        return labels, torch.cat([part["hashes"] for part in parts])

    def _tensors(self, shard: Shard) -> dict[str, Tensor]:
        """Return the tensors of a shard, mapped into memory. Raise ValueError (one line) where they
        are others than its index says."""
        path, (channels, *size) = self._root / shard.name, self._index.latent_shape
        moments = (shard.images, 2, 2 * channels, *size)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("moments", "labels", "hashes")}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"data: {printable(path)}: not a readable shard ({error})") from None
        kinds = {"moments": torch.float16, "labels": torch.int64, "hashes": torch.int64}
        for name, tensor in tensors.items():
            shape = moments if name == "moments" else (shard.images,)
            if tuple(tensor.shape) != shape or tensor.dtype != kinds[name]:
                raise ValueError(
                    f"data: {printable(path)}: {name} must be {list(shape)} of {kinds[name]}, got "
                    f"{list(tensor.shape)} of {tensor.dtype}"
                )
        return tensors
