"""The options of `msf.sample` on the command line, and batches of its images."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..training.config import PRECISIONS

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import MSFConfig
    from ..model import MSF


def number(text: str) -> float:
    """A finite float."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that shapes images, but ``--steps`` and ``--seed``: they differ between the commands."""
    parser.add_argument(
        "--guidance-scale",
        nargs="+",
        type=number,
        default=[1.0],
        metavar="G",
        help="one for all stages or one a stage; 1 (default) is none",
    )
    parser.add_argument(
        "--guidance-interval",
        nargs=2,
        type=number,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="times with guidance, 0 being noise and 1 the image",
    )
    parser.add_argument("--solver", choices=("euler", "heun"), default="euler")
    parser.add_argument(
        "--prior-noise",
        type=number,
        default=0.0,
        metavar="SIGMA",
        help="noise on what residuals are generated above, in the base's standard deviations",
    )
    parser.add_argument(
        "--project-residual",
        action="store_true",
        help="make the image, pooled, equal its base up to rounding",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 on a GPU that computes in it, fp32 elsewhere",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")


def options(
    args: argparse.Namespace, steps: Sequence[int] | None, config: MSFConfig
) -> dict[str, Any]:
    """Keyword arguments of `msf.sample` that are the same for every batch; ValueError if wrong."""
    from ..sampling import stage_settings

    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2^63, got {args.seed}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    chosen = {
        "steps": one_or_all(steps),
        "guidance_scale": one_or_all(args.guidance_scale),
        "guidance_interval": tuple(args.guidance_interval),
        "solver": args.solver,
        "prior_noise": args.prior_noise,
        "project_residual": args.project_residual,
    }
    stage_settings(config, **chosen)
    return chosen


def one_or_all(values: Sequence[Any] | None) -> Any:
    """A single value stands for every stage."""
    return values[0] if values and len(values) == 1 else values


def generate(
    model: MSF,
    labels: Tensor | None,
    seeds: Sequence[int],
    args: argparse.Namespace,
    *,
    bases: Tensor | None = None,
    **options: Any,
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(images, components) on the CPU, batch by batch."""
    from ..sampling import sample
    from ..training.stage import autocast

    device = model.pyramid.mean.device
    # Unlike in training: the figures we publish for a CPU are the same on every CPU.
    fp32 = args.precision == "auto" and device.type == "cpu"
    for start in range(0, len(seeds), args.batch_size):
        rows = slice(start, start + args.batch_size)
        with autocast(device, "fp32" if fp32 else args.precision):
            images, components = sample(
                model,
                None if labels is None else labels[rows],
                seeds=seeds[rows],
                base=None if bases is None else bases[rows],
                return_components=True,
                **options,
            )
        yield images.cpu(), [component.cpu() for component in components]
