"""Make a folder of a model from released weights of DiT, SiT, LightningDiT, REPA or diffusers.

CHECKPOINT is a .safetensors file, a file of torch (which is read without running anything in it),
or a folder of diffusers. Where a file holds several weights, the averaged ones ("ema") are taken.
The model has one stage (N = 0) and computes what the checkpoint's does; latents are scaled as there
(0.18215 for DiT, SiT and REPA). What is known of the formats:

  dit           predicts noise: msf sample takes --solver ddpm or ddim; its learned variance is
                dropped, so ddpm has the posterior's; it cannot be trained on
  sit           a velocity; the tensors are those of dit, so --format tells them apart, unless the
                file has the options of its training
  lightningdit  a velocity; with any of its options (RoPE, RMS norm, SwiGLU, QK-norm, no shifts)
  repa          a velocity; its time runs from data to noise, and is turned; projectors are dropped
  diffusers     the folder of a DiTTransformer2DModel, of a pipeline its subfolder transformer;
                predicts noise as dit; sinusoids of time as diffusers computes them, which are not
                quite DiT's

SiT, LightningDiT and REPA must be of the linear path. All tables of positions must be DiT's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...files import printable
from .. import outputs, tables

FORMATS = ("auto", "dit", "sit", "lightningdit", "repa", "diffusers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--out", type=outputs.place, required=True, metavar="DIR")
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="auto: by names and shapes of the tensors"
    )
    parser.add_argument(
        "--heads",
        type=int,
        metavar="N",
        help="of attention, which weights do not tell; those of published sizes are known",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.heads is not None and args.heads < 1:
        raise ValueError(f"--heads must be at least 1, got {args.heads}")
    outputs.check_new_folder(args.out)
    from ...importing import import_checkpoint

    model, format, notes = import_checkpoint(args.checkpoint, args.format, heads=args.heads)
    model.save_pretrained(args.out)
    return {
        "out": str(args.out),
        "format": format,
        "config": model.config.to_dict(),
        "parameters": sum(x.numel() for x in model.parameters()),
        "notes": notes,
    }


def text(document: dict[str, Any]) -> str:
    config = document["config"]
    (stage,) = config["stages"]
    facts = [
        ("model", printable(document["out"])),
        ("format", document["format"]),
        ("size", tables.size(config["image_size"])),
        ("channels", config["channels"]),
        ("classes", config["num_classes"]),
        ("stage", ", ".join(f"{key} {value:g}" for key, value in stage.items())),
        ("parameters", f"{document['parameters']:,}"),
        ("predicts", config["prediction"]),
        ("notes", "; ".join(document["notes"]) or "none"),
    ]
    return tables.pairs(facts)
