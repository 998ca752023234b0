"""``msf evaluate FILE.npz``: images in ADM's format against a reference, by ADM's protocol."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..files import printable
from ..sampling_config import SamplingConfig
from . import models, outputs, tables

SUFFIX = ".npz"
OF_A_MODEL: dict[str, Any] = {  # options, and what they are where they are left out
    "data": None,
    "data_changed": False,
    "samples": None,
    "seed": 0,
    "precision": "auto",
    **dict.fromkeys(field.name for field in fields(SamplingConfig)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images in a FILE.npz")
    group.add_argument(
        "--reference",
        type=Path,
        metavar="FILE.npz",
        help="images, statistics (mu, sigma), or both, as in ADM's reference batches",
    )
    group.add_argument(
        "--inception",
        type=Path,
        metavar="WEIGHTS",
        help="FID's Inception-v3: pt_inception-2015-12-05-6726825d.pth of pytorch-fid's releases",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation.archive import Archive
    from ..evaluation.inception import WEIGHTS
    from ..evaluation.protocol import compare

    if given := [name for name, default in OF_A_MODEL.items() if getattr(args, name) != default]:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} is for a model's folder; {args.model} is a file of images")
    if args.reference is None:
        raise ValueError(f"{args.model}: give the file to compare it with as --reference")
    if args.inception is None:
        raise ValueError(f"{args.model}: give FID's Inception as --inception: {WEIGHTS}")
    models.check_batch_size(args)
    if args.out:
        outputs.check_file(args.out, args.overwrite)
        outputs.check_not_read(args.out, args.model, args.reference, args.inception)
    comparison = compare(
        Archive(args.model),
        Archive(args.reference),
        args.inception,
        batch_size=args.batch_size,
        device=models.device(args),
        progress=True,
    )
    document = comparison.to_dict()
    if args.out:
        outputs.write_json(args.out, document)
    return document


def is_for(path: Path) -> bool:
    """Tell whether what is to be evaluated is a file of images, or else a model's folder."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def check_not_given(args: argparse.Namespace) -> None:
    """Raise ValueError where options of this module are given for a model's folder."""
    for name in ("reference", "inception"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is for images in a file {SUFFIX}, got {args.model}")


def text(document: dict[str, Any]) -> str:
    from ..evaluation.protocol import TITLES

    figures = [(TITLES[name], f"{value:.4f}") for name, value in document["figures"].items()]
    compared = [
        (role, f"{printable(document[role]['file'])}, {document[role]['images']:,} images")
        for role in ("images", "reference")
    ]
    notes = [("note", note) for note in document["notes"]]
    return tables.pairs([*figures, *compared, *notes])
