"""Small subjects of the benchmarks of models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from calls import session, target_of

from benchmarks.arms import Arm
from benchmarks.block import BlockPass
from benchmarks.measure import measure
from benchmarks.models import CPU
from benchmarks.sampler import Sampling
from benchmarks.subject import Subject
from benchmarks.training import TrainingStep

DEVICE = torch.device("cpu")


def block(backward: bool = True) -> BlockPass:
    return BlockPass.draw(CPU.stage, (2, 5), 2, backward, DEVICE)


def sampling() -> Sampling:
    return Sampling.draw("digits", (2, 1), 2, DEVICE)


def training() -> TrainingStep:
    return TrainingStep.draw("digits", 2, DEVICE)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "block": partial(block, False),
    "block and backward": block,
    "sampling": sampling,
    "training step": training,
}


def rows_of(subject: Subject, *arms: Arm) -> list[Any]:
    return measure(session(), target_of(subject, arms), [arm.name for arm in arms])
