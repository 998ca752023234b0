"""Look into a trained model, or factorise an image.

Of a folder: configuration, stages, statistics and training. Of an image: writes base.png,
residual.png (one a level, around grey and two standard deviations wide) and merged.png, and prints
what share of the image's variance each component holds.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..training.config import read_run
from . import factorize, outputs, tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR|IMAGE")
    image = parser.add_argument_group("of an image")
    image.add_argument("--levels", type=int, default=1, metavar="N", help="residuals (default 1)")
    image.add_argument("--upsample", choices=("nearest", "bilinear"), default="nearest")
    image.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: IMAGE's name and -msf, beside it"
    )
    outputs.add_overwrite_argument(image)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.path.is_file():
        return factorize.run(args)
    if not args.path.exists():
        raise ValueError(f"{args.path}: no such file or folder")
    if args.out or args.overwrite or args.levels != 1 or args.upsample != "nearest":
        raise ValueError(f"{args.path}: is a folder; only of an image are parts made and written")
    return _describe(args.path)


def text(document: dict[str, Any]) -> str:
    if "image" in document:
        return factorize.text(document)
    config, training = document["config"], document["training"]
    facts = [
        ("model", document["model"]),
        ("size", tables.size(config["image_size"])),
        ("channels", config["channels"]),
        ("classes", config["num_classes"] or "none"),
        ("upsampling", config["upsample"]),
        ("positions", config["positions"] + (", QK-norm" if config["qk_norm"] else "")),
    ]
    if training:
        settings = ", ".join(f"{key} {value}" for key, value in training["training"].items())
        facts += [("data", training["data"]), ("training", settings)]
    return tables.pairs(facts) + "\n\n" + _stage_table(document["stages"])


def _describe(directory: Path) -> dict[str, Any]:
    from ..flops import stage_costs
    from ..model import MSF

    model, run = MSF.from_pretrained(directory), read_run(directory)
    stages = [
        {
            "name": cost.name,
            "size": list(cost.size),
            "tokens": cost.tokens,
            **{key: getattr(stage, key) for key in ("width", "depth", "heads", "patch")},
            "parameters": cost.parameters,
            "trained": cost.name not in model.untrained_stages,
            "mean": mean.tolist(),
            "std": std.tolist(),
        }
        for cost, stage, mean, std in zip(
            stage_costs(model.config),
            model.config.stages,
            model.pyramid.mean,
            model.pyramid.std,
            strict=True,
        )
    ]
    return {
        "model": str(directory),
        "config": model.config.to_dict(),
        "stages": stages,
        "training": None if run is None else asdict(run),
    }


def _stage_table(stages: list[dict[str, Any]]) -> str:
    rows = [
        {
            **stage,
            "size": tables.size(stage["size"]),
            "mean": " ".join(f"{value:.3f}" for value in stage["mean"]),
            "std": " ".join(f"{value:.3f}" for value in stage["std"]),
        }
        for stage in stages
    ]
    return tables.table(list(rows[0]), [list(row.values()) for row in rows])
