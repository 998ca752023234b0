"""Small folders of latents, made without a VAE."""

from pathlib import Path

import torch

from msf.data.latent_index import FORMAT, LatentIndex, Vae, write_index, write_shard
from msf.data.splits import hash_of

SHAPE = (4, 8, 8)
VAE = Vae(sha256="0" * 64, scaling_factor=0.5, shift_factor=0.25)
SHARD = 64


def moments(count, seed=0):
    """Moments (count, 2, 8, 8, 8) float16 of means and log-variances around -2."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 2, 2, *SHAPE, generator=generator)
    drawn[:, :, 1] = 0.5 * drawn[:, :, 1] - 2
    return drawn.flatten(2, 3).half()


def write_latents(folder: Path, count=150, classes=10, x=None, **changes):
    """Write ``count`` latents, image i of class i modulo ``classes``, in shards of 64."""
    folder.mkdir(exist_ok=True)
    x = moments(count) if x is None else x
    labels = torch.arange(count) % max(classes, 1)
    hashes = torch.tensor([hash_of(f"{int(k)}/{i}.png") for i, k in enumerate(labels)])
    parts = zip(*(tensor.split(SHARD) for tensor in (x, labels, hashes)))
    shards = tuple(write_shard(folder, i, *part) for i, part in enumerate(parts))
    names = tuple(str(k) for k in range(classes))
    values = dict(format=FORMAT, source="photos", fingerprint="f", vae=VAE, image_size=64)
    values |= dict(latent_shape=SHAPE, class_names=names, found=count, shard_images=SHARD)
    values |= dict(images=count, shards=shards)
    write_index(folder, LatentIndex(**{**values, **changes}))
    return x, labels, hashes
