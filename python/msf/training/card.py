"""The model card of a run: README.md in its folder, as the Hugging Face Hub shows one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..config import MSFConfig
from ..data import HOLDOUT
from ..files import printable
from .config import RunConfig

HEADER = """---
library_name: msf
pipeline_tag: unconditional-image-generation
tags: [msf, diffusion, flow-matching]
---
"""
UNSAID = ("wandb",)  # of no interest to others


def model_card(config: MSFConfig, run: RunConfig, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return what is known of a model: its configuration, data and training, and the last line of
    ``metrics`` of each stage. It claims nothing of its quality: evaluations are files of their
    own."""
    last = {row["stage"]: row for row in metrics}
    training = {name: x for name, x in asdict(run.training).items() if name not in UNSAID}
    classes = f"{config.num_classes:,} classes" if config.num_classes else "without classes"
    height, width = config.image_size
    held_out = "" if run.training.holdout == HOLDOUT else f", {run.training.holdout:g} held out"
    began = f" It began with the weights of `{printable(run.start)}`." if run.start else ""
    rows = [
        f"| {name} | {row['step']:,} | {row['loss']:.4f} | {_validation(row)} |"
        for name, row in last.items()
    ]
    return "\n".join(
        [
            f"{HEADER}# Multi-scale latent factorization of {height}x{width}, {classes}",
            "",
            "A model of [MSF](https://arxiv.org/abs/2501.13349): one diffusion transformer for the "
            "base, one for each residual.",
            "",
            "```python",
            "import msf",
            'images = msf.Pipeline.from_pretrained("this folder")'
            + ("([0, 1, 2]).images" if config.num_classes else "(seeds=[0, 1, 2]).images"),
            "```",
            "",
            f"Trained on `{printable(run.data)}`{held_out}.{began}",
            "",
            "| stage | steps | loss | on held-out images |",
            "|---|---|---|---|",
            *rows,
            "",
            "The loss is the mean squared error of the velocity. No quality of images was measured "
            "here.",
            "",
            *_details("Configuration", config.to_dict()),
            *_details("Training", training),
        ]
    )


def _validation(row: Mapping[str, Any]) -> str:
    return f"{row['validation_loss']:.4f}" if "validation_loss" in row else "-"


def _details(title: str, values: Mapping[str, Any]) -> list[str]:
    return [f"## {title}", "", "```json", json.dumps(values, indent=2), "```", ""]
