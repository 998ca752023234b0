"""The options of `msf.sample` on the command line, and batches of its images."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..sampling_config import SOLVERS, SamplingConfig
from ..training.config import PRECISIONS
from . import models

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config import MSFConfig
    from ..model import MSF
    from ..sampling import Sample


DEFAULTS = SamplingConfig()


def number(text: str) -> float:
    """Return a finite float."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all that shapes images, but ``--steps`` and ``--seed``, which differ between the
    commands. What is left out stays None: the defaults are those of ``SamplingConfig``."""
    parser.add_argument(
        "--guidance-scale",
        nargs="+",
        type=number,
        metavar="G",
        help=f"one for all stages or one a stage; 1 is none (default {DEFAULTS.guidance_scale:g})",
    )
    parser.add_argument(
        "--guidance-interval",
        nargs=2,
        type=number,
        metavar=("LOW", "HIGH"),
        help="times with guidance, 0 being noise and 1 the image",
    )
    parser.add_argument(
        "--solver",
        choices=SOLVERS,
        help="euler (the default) or heun, of models that predict noise ddpm (the default) or ddim",
    )
    parser.add_argument(
        "--prior-noise",
        type=number,
        metavar="SIGMA",
        help="noise on what residuals are generated above, in the base's standard deviations",
    )
    parser.add_argument(
        "--project-residual",
        action="store_true",
        default=None,
        help="make the image, pooled, equal its base up to rounding",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 on a GPU that computes in it, fp32 elsewhere",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")


def read(args: argparse.Namespace, steps: Sequence[int] | None, model: MSFConfig) -> SamplingConfig:
    """Return how to sample from ``model``; a ValueError says what is wrong."""
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2^63, got {args.seed}")
    models.check_batch_size(args)
    values = {field.name: getattr(args, field.name) for field in fields(SamplingConfig)}
    values |= {"steps": _one_or_each(steps), "guidance_scale": _one_or_each(args.guidance_scale)}
    config = SamplingConfig(**{name: value for name, value in values.items() if value is not None})
    config.stages(model)
    return config


def _one_or_each(values: Sequence[Any] | None) -> Any:
    """Return a single value as such, which stands for every stage."""
    return values[0] if values and len(values) == 1 else values


def precision(args: argparse.Namespace, device: torch.device) -> str:
    """Return --precision, but "auto" as what it means on a CPU. In training that may choose bf16;
    the figures we publish for a CPU are the same on every one."""
    return "fp32" if args.precision == "auto" and device.type == "cpu" else args.precision


def generate(
    model: MSF,
    labels: Tensor | None,
    seeds: Sequence[int],
    config: SamplingConfig,
    args: argparse.Namespace,
    *,
    bases: Tensor | None = None,
) -> Iterator[Sample]:
    """Yield images and components on the CPU, batch by batch."""
    from ..precision import autocast
    from ..sampling import Sample, sample_components

    device = model.pyramid.mean.device
    for start in range(0, len(seeds), args.batch_size):
        rows = slice(start, start + args.batch_size)
        with autocast(device, precision(args, device)):
            images, components = sample_components(
                model,
                None if labels is None else labels[rows],
                seeds=seeds[rows],
                config=config,
                base=None if bases is None else bases[rows],
            )
        yield Sample(images.cpu(), [component.cpu() for component in components])
