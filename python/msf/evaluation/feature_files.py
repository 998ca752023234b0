"""Inception's features of the images in an npz file, kept beside it.

X.npz.features-<first 8 digits of the weights' sha256>.safetensors holds pool (N, 2048) and spatial
(N, 2023) float32; its metadata say of which images and weights they are, and have a checksum.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import atomic_write
from ..parsing import parse_whole
from ..progress import follow, say
from ..weights import tensor_checksum
from .archive import Archive
from .inception import POOL_DIM, SPATIAL_DIM, Features, Inception, extract

FORMAT = "1"  # of the file, and of how features are computed


def feature_file(images: Path, weights_sha256: str) -> Path:
    return images.with_name(f"{images.name}.features-{weights_sha256[:8]}.safetensors")


def features_of(
    archive: Archive,
    network: Inception,
    weights_sha256: str,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Features:
    """Return the features, on the CPU, of all images in ``archive``, and keep them for the next
    call. What is kept is not used where it is damaged or of others.

    ``network`` is on ``device``; it gets ``batch_size`` images at a time.
    """
    file = feature_file(archive.path, weights_sha256)
    key = {"format": FORMAT, "images": archive.sha256, "weights": weights_sha256}
    if file.exists():
        try:
            return _read(file, key, len(archive))
        except ValueError as error:
            say(f"{file}: {error}; computing its features anew")
    features = _extracted(archive, network, batch_size, device, progress)
    try:
        with atomic_write(file) as temporary:
            tensors = features._asdict()
            checksum = {"crc32": tensor_checksum(tensors, str(key))}
            save_file(tensors, temporary, metadata={**key, **checksum})
    except (OSError, SafetensorError) as error:
        say(f"{file}: cannot be written ({error}); the next evaluation computes its features anew")
    return features


def _extracted(
    archive: Archive,
    network: Inception,
    batch_size: int,
    device: torch.device | str,
    progress: bool,
) -> Features:
    count, batch_size = len(archive), parse_whole(batch_size, "evaluation: batch_size", 1)
    features = Features(torch.empty(count, POOL_DIM), torch.empty(count, SPATIAL_DIM))
    batches, done = -(-count // batch_size), 0
    name = f"features of {archive.path.name}"
    for images in follow(archive.batches(batch_size), name, batches, "batches", shown=progress):
        rows = slice(done, done + len(images))
        for kept, found in zip(features, extract(network, images.to(device)), strict=True):
            kept[rows] = found.cpu()
        done = rows.stop
    return features


def _read(file: Path, key: dict[str, str], count: int) -> Features:
    """Return the features kept in ``file``. Raise ValueError unless they are those of ``key``."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in Features._fields}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"not readable ({error})") from None
    if {name: metadata.get(name) for name in key} != key:
        raise ValueError("of other images or weights")
    shapes = {"pool": (count, POOL_DIM), "spatial": (count, SPATIAL_DIM)}
    whole = metadata.get("crc32") == tensor_checksum(tensors, str(key))
    if not whole or {name: tuple(x.shape) for name, x in tensors.items()} != shapes:
        raise ValueError("damaged")
    return Features(**tensors)
