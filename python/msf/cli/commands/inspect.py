"""Look into a trained model: configuration, stages, statistics and training.

Of a folder of latents: what it holds, and whether its files are what they were.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...files import printable, quoted
from ...training.config import class_names_of, read_run
from .. import latents, models, tables

QK_NORMS = {False: "", True: ", QK-norm", "layer": ", QK-norm by LayerNorm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="DIR", help="a folder of a trained model or of latents"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ...data import is_latents
    from ...flops import stage_costs

    if is_latents(args.model):
        return latents.document(args.model)
    model, training = models.read(args.model), read_run(args.model)
    class_names_of(args.model, training, model.config.num_classes)
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
        "model": str(args.model),
        "config": model.config.to_dict(),
        "stages": stages,
        "training": None if training is None else asdict(training),
    }


def text(document: dict[str, Any]) -> str:
    if "latents" in document:
        return latents.text(document)
    config, training = document["config"], document["training"]
    facts = [
        ("model", document["model"]),
        ("size", tables.size(config["image_size"])),
        ("channels", config["channels"]),
        ("classes", config["num_classes"] or "none"),
        ("upsampling", config["upsample"]),
        ("positions", config["positions"] + QK_NORMS[config["qk_norm"]]),
        ("norm, MLP", f"{config['norm']}, {config['mlp']}"),
    ]
    if training:
        if training["class_names"] and config["num_classes"]:
            facts.append(("class names", _classes(training["class_names"])))
        settings = ", ".join(f"{key} {value}" for key, value in training["training"].items())
        facts += [("data", printable(training["data"])), ("training", settings)]
    return tables.pairs(facts) + "\n\n" + _stage_table(document["stages"])


def _classes(names: Sequence[str]) -> str:
    """Return names and numbers, as ``msf sample --labels`` takes both."""
    return ", ".join(f"{number} {quoted(name)}" for number, name in enumerate(names))


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
