"""Generate images with a trained model.

A .npz file gets what evaluations of ADM take: arr_0 (N, H, W, 3) uint8, of a grey model three equal
channels, and arr_1, the labels (N,) int64. A folder gets one PNG an image, named by its index, a
.png file one grid: base, residuals and the merged image side by side. A .safetensors file gets the
tensor "images" (N, C, H, W) float32. Latents become pictures by --vae, of which a grid shows no
parts; without it a .safetensors file is their only form. Pixels are rounded to the nearest of
0..255, where ADM truncates. A grid holds at most 10,000 images, a folder or .npz file 1,000,000,
and a .png or .safetensors file what takes 4 GiB as float32.

The number of image i is S + i. Its class and noise are functions of that, so up to rounding it does
not depend on --num-images or --batch-size. Batches are kept in PATH.parts until the output is
whole: whatever ends the command, the same command continues it. Several GPUs make the bits of one:

  torchrun --nproc-per-node 8 -m msf.cli sample DIR --num-images 50000 --out samples.npz
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import quoted
from ...progress import say
from ...training.identity import listed
from .. import models, outputs, sampling, tables
from ..errors import Failure
from ..labels import NAMED, NUM

if TYPE_CHECKING:
    from ...parts import Parts

NO_CLASS = "(no class)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR", help="a trained model's folder")
    parser.add_argument(
        "--out", type=outputs.place, required=True, metavar="PATH", help="file or folder to write"
    )
    parser.add_argument(
        "--labels",
        "--label",
        metavar="K,...",
        help="classes, image number n being of the n-th modulo how many they are, each by its name "
        "or, where no class has that name, its number (default: all of them); the number of "
        "classes means none; random: one drawn for each number",
    )
    parser.add_argument(
        "--num-images", type=int, metavar="N", help=f"images (default: one a label, or {NUM})"
    )
    parser.add_argument(
        "--steps", nargs="+", type=int, metavar="N", help="one for all stages or one a stage"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="image i has number S + i")
    parser.add_argument(
        "--vae", type=Path, metavar="FOLDER", help="an AutoencoderKL to decode latents with"
    )
    sampling.add_arguments(parser)
    outputs.add_overwrite_argument(parser)
    models.add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was made, in the process that put it together, nothing in others."""
    device = models.device(args)
    from ...modes import own_modes
    from ...training.ranks import FailedElsewhere, started
    from ..sample_job import prepare

    with ExitStack() as claims, own_modes():
        try:
            with started(device) as (ranks, device):
                job = ranks.each(lambda: prepare(args, device, ranks.rank, ranks.count))
                claims.enter_context(job.parts.claimed(ranks))
                todo = ranks.each(job.todo)
                left = sum(ranks.gather(len(todo)))
        except FailedElsewhere:  # where it is told
            raise Failure("", 1) from None
        if ranks.is_first and left < job.parts.count:
            done = f"{job.parts.count - left:,} of {job.parts.count:,} batches are there"
            say(f"{job.parts.folder}: continuing, {done}")
        try:
            job.make_parts(todo)
            return job.document() if job.assemble() else {}
        except KeyboardInterrupt:
            raise _interrupted(job.parts, ranks.is_first) from None


def _interrupted(parts: Parts, is_first: bool) -> BaseException:
    """Return what the command ends with, of which the first process alone tells."""
    if not is_first:
        return Failure("", 130)
    if not (there := parts.there()):
        return KeyboardInterrupt()
    return Failure(
        f"interrupted; {there:,} of {parts.count:,} batches are kept in {parts.folder}, the same "
        "command continues",
        130,
    )


def text(document: dict[str, Any]) -> str:
    first, last = document["seeds"]
    size = tables.size(document["size"])
    line = f"{document['out']}: {document['images']} images of {size}, seeds {first} to {last}"
    if not document["classes"]:
        return line
    classes = [NO_CLASS if name is None else quoted(name) for name in document["classes"]]
    return f"{line}, classes {listed(classes, NAMED)}"
