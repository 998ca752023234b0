"""Encode a folder of images as latents of a VAE, for msf train --data.

FOLDER is as msf train --data takes it. An image is cropped at its centre as by ADM and DiT: halved
while its shorter side is at least twice --size, resized to it, cropped. The VAE is an AutoencoderKL
that diffusers saved on this machine. --out gets mean and log-variance, in float16 and unscaled, of
the posteriors of each image and of its mirror image, in shards of 1,024 images with an index,
latents.json. Images that cannot be read are skipped, but more than one in a hundred are an error.

Whatever ends it, the same command continues after the last whole shards. Several GPUs:

  torchrun --nproc-per-node 8 -m msf.cli encode FOLDER --vae VAE --out DIR
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import check_outside
from .. import latents, models, outputs
from ..errors import Failure

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--vae", type=Path, required=True, metavar="PATH", help="the folder of an AutoencoderKL"
    )
    parser.add_argument(
        "--size", type=int, default=256, metavar="N", help="pixels a side (default 256)"
    )
    parser.add_argument("--out", type=outputs.place, required=True, metavar="DIR")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images at once (default 32)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    models.add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return what --out holds, nothing while other processes have still to end."""
    if not args.images.is_dir():
        raise ValueError(f"{args.images}: no such folder; give a folder of images")
    check_outside(args.out, args.images)
    models.check_batch_size(args)
    from ...data.latent_index import is_latents, read_index
    from ...encoding.encode import encode, report
    from ...training.batches import loader_workers

    rank = int(os.environ.get("RANK", 0))
    try:
        index = encode(
            args.images,
            args.vae,
            args.size,
            args.out,
            batch_size=args.batch_size,
            device=_device(args),
            rank=rank,
            processes=int(os.environ.get("WORLD_SIZE", 1)),
            workers=loader_workers(),
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        if rank:
            raise Failure("", 130) from None
        if not is_latents(args.out):
            raise
        index = read_index(args.out)
        raise Failure(
            f"interrupted; {len(index.shards):,} of {index.shard_count:,} shards are whole in "
            f"{args.out}, the same command continues",
            130,
        ) from None
    if not index.is_complete:
        return {}
    report(index)
    return latents.summary(args.out, index)


def text(document: dict[str, Any]) -> str:
    return latents.text(document)


def _device(args: argparse.Namespace) -> torch.device:
    """Return the device asked for, of several GPUs that of this process."""
    import torch

    device = models.device(args)
    if device.type == "cpu":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
