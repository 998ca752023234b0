"""The targets of models, which are blocks, training steps and sampling, and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

import msf

from . import fingerprint
from .arms import Arm
from .block import BlockPass, kind_of
from .sampler import Sampling, images_shape
from .subject import Subject, Target
from .training import TrainingStep
from .transformers import ARMS

# The least seconds that an arm took on one H200, most of them to compile.
SECONDS = {"block": 5.0, "block and backward": 4.0, "training step": 9.0, "sampling": 26.0}


@dataclass(frozen=True)
class Sizes:
    """A Sizes says at which sizes models are measured. The first of each tuple counts most.

    A block of `stage` runs on each of the `grids`, with about `tokens` tokens in a batch. Each of
    the `samplers` (preset, steps of each stage) runs at each of the `batches`. A step of each
    `trained` preset runs on `training_batch` images.
    """

    stage: msf.StageConfig
    grids: tuple[tuple[int, int], ...]
    tokens: int
    samplers: tuple[tuple[str, tuple[int, ...]], ...]
    batches: tuple[int, ...]
    trained: tuple[str, ...]
    training_batch: int


GPU = Sizes(
    stage=msf.preset("msf-xl-256").model.stages[0],
    grids=((16, 16), (8, 8), (32, 32), (8, 10)),
    tokens=16384,
    samplers=(("msf-xl-256", (50, 5)), ("sit-xl-256-msf", (50,))),
    batches=(64, 1),
    trained=("sit-xl-256-msf", "msf-xl-256"),
    training_batch=128,
)
CPU = Sizes(
    stage=msf.StageConfig(width=64, depth=1, heads=2, patch=2),
    grids=((4, 4), (2, 5)),
    tokens=64,
    samplers=(("digits", (2, 1)),),
    batches=(1, 2),
    trained=("digits",),
    training_batch=4,
)


def targets(device: torch.device, sizes: Sizes | None = None) -> Iterator[Target]:
    """Yield the targets of models, by default at the sizes that suit the device."""
    sizes = sizes or (CPU if device.type == "cpu" else GPU)
    width = sizes.stage.width
    for backward, (place, grid) in product((False, True), enumerate(sizes.grids)):
        tokens = grid[0] * grid[1]
        batch = max(1, sizes.tokens // tokens)
        block = partial(BlockPass.draw, sizes.stage, grid, batch, backward, device)
        # An arm that makes CUDA graphs cannot be captured in another one.
        yield _target(kind_of(backward), "", (batch, tokens, width), place, block, graphs=False)
    for place, name in enumerate(sizes.trained):
        batch = sizes.training_batch
        step = partial(TrainingStep.draw, name, batch, device)
        # A CUDA graph for each block needs more memory than there is.
        yield _target("training step", name, images_shape(name, batch), place, step, graphs=False)
    for place, ((name, steps), batch) in enumerate(product(sizes.samplers, sizes.batches)):
        images = partial(Sampling.draw, name, steps, batch, device)
        yield _target("sampling", name, images_shape(name, batch), place, images)


def _target(
    kind: str,
    model: str,
    shape: tuple[int, ...],
    place: int,
    draw: Callable[[], Subject],
    *,
    graphs: bool = True,
) -> Target:
    return Target(
        op=kind,
        family=kind,
        benchmark=f"{kind} {model}".strip(),
        shape=shape,
        dtype="bfloat16",
        place=place,
        arms=tuple(arm for arm in ARMS if graphs or not arm.makes_graphs),
        fingerprint=_fingerprint,
        draw=draw,
        seconds=SECONDS[kind],
    )


def _fingerprint(arm: Arm) -> str | None:
    return fingerprint.of_models() if arm.ours else None
