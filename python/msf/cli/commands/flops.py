"""Count a model's parameters and the multiply-accumulates (GMACs) of sampling one image.

Without a model: every preset in one line. DiT-XL/2 is compared at 250 steps, 118.64 GMACs a
forward at 256 pixels and 524.60 at 512 ("Gflops" in its paper). Guidance doubles both sides and is
left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...config import MSFConfig
from ...presets import PRESETS
from .. import settings, tables

STAGE_HEADERS = ("stage", "size", "tokens", "parameters", "GMACs/forward", "steps", "GMACs/image")
PRESET_HEADERS = ("preset", "parameters", "steps", "GMACs/image", "% of DiT-XL/2", "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="DIR", help="a trained model's folder"
    )
    settings.add_arguments(parser, required=False)
    parser.add_argument(
        "--steps", nargs="+", type=int, metavar="N", help="one for all stages or one a stage"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    named = [source for source in (args.model, args.preset, args.config) if source]
    if len(named) > 1:
        raise ValueError("DIR, --preset and --config exclude each other; give one of them")
    if named:
        config = _config(args)
        return _costs(config, args.steps and settings.one_a_stage(args.steps, config))
    if args.steps:
        raise ValueError("--steps needs a model; add DIR, --preset or --config")
    return {"presets": [_summary(name) for name in PRESETS]}


def text(document: dict[str, Any]) -> str:
    if "presets" in document:
        return tables.table(PRESET_HEADERS, [list(row.values()) for row in document["presets"]])
    rows: list[tuple[Any, ...]] = [
        (stage.pop("name"), tables.size(stage.pop("size")), *stage.values())
        for stage in map(dict, document["stages"])
    ]
    rows.append(
        ("total", "", None, document["parameters"], None, None, document["gmacs_per_image"])
    )
    lines = [tables.table(STAGE_HEADERS, rows)]
    if baseline := document["dit_xl_2"]:
        lines.append(
            f"DiT-XL/2 at {baseline['image_size']} pixels: {baseline['gmacs_per_forward']} "
            f"GMACs/forward x {baseline['steps']} steps = {baseline['gmacs_per_image']:,.0f}; "
            f"this is {baseline['percent']:.1f} % of it"
        )
    lines.append("Without guidance, which doubles both.")
    return "\n".join(lines)


def _config(args: argparse.Namespace) -> MSFConfig:
    return settings.of_model(args.model) if args.model else settings.read(args)[0]


def _costs(config: MSFConfig, steps: list[int] | None) -> dict[str, Any]:
    from ...flops import DIT_STEPS, DIT_XL_2, dit_baseline, stage_costs

    costs = stage_costs(config, steps)
    total = sum(cost.macs_per_image for cost in costs) / 1e9
    baseline = None
    if found := dit_baseline(config):
        pixels, gmacs = found
        baseline = {
            "image_size": pixels,
            "gmacs_per_forward": DIT_XL_2[pixels],
            "steps": DIT_STEPS,
            "gmacs_per_image": gmacs,
            "percent": 100 * total / gmacs,
        }
    return {
        "stages": [
            {
                "name": cost.name,
                "size": list(cost.size),
                "tokens": cost.tokens,
                "parameters": cost.parameters,
                "gmacs_per_forward": cost.macs / 1e9,
                "steps": cost.steps,
                "gmacs_per_image": cost.macs_per_image / 1e9,
            }
            for cost in costs
        ],
        "parameters": sum(cost.parameters for cost in costs),
        "gmacs_per_image": total,
        "dit_xl_2": baseline,
    }


def _summary(name: str) -> dict[str, Any]:
    costs = _costs(PRESETS[name].model, None)
    return {
        "preset": name,
        "parameters": costs["parameters"],
        "steps": "+".join(str(stage["steps"]) for stage in costs["stages"]),
        "gmacs_per_image": costs["gmacs_per_image"],
        "percent_of_dit_xl_2": costs["dit_xl_2"] and costs["dit_xl_2"]["percent"],
        "note": PRESETS[name].note,
    }
