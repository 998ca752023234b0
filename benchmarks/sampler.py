"""Guided sampling of a whole model, from seeds to images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import msf
from msf.flops import stage_costs

from .rows import Row
from .timing import Replay, Stopwatch, Work, wall_stopwatch
from .transformers import EAGER, Way

GUIDANCE = 1.5  # DiT's
CHECKED = 4  # images of a batch: float32 is slow, and an image does not depend on its batch


def random_model(name: str, device: torch.device) -> msf.MSF:
    """A preset with random weights, also where training starts from zeros, which hide all."""
    with device:
        model = msf.MSF(msf.preset(name).model)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@dataclass(frozen=True)
class Sampling:
    """A call gives the images of the seeds 0 .. batch - 1; `steps` is one number a stage."""

    name: str
    model: msf.MSF
    steps: tuple[int, ...]
    batch: int

    @classmethod
    def draw(cls, name: str, steps: tuple[int, ...], batch: int, device: torch.device) -> Sampling:
        """Random weights in bfloat16."""
        model = random_model(name, device)
        for stage in model.stages:
            stage.bfloat16()  # autocast would cast every weight anew in a compiled step
        return cls(name, model, steps, batch)

    @property
    def row(self) -> Row:
        macs = sum(cost.macs_per_image for cost in stage_costs(self.model.config, self.steps))
        # A multiplication and an addition each, with and without the label.
        flops, steps = 2 * 2 * self.batch * macs, sum(self.steps)
        return Row("sampling", self.name, self.batch, self.batch, flops, steps)

    def suits(self, way: Way) -> bool:
        return True

    def exact(self) -> tuple[Tensor, ...]:
        """The first images in float32."""
        model = copy.deepcopy(self.model).float()
        few = replace(self, model=model, batch=min(self.batch, CHECKED))
        return few.work(EAGER).run()[0]

    def work(self, way: Way) -> Work:
        runs = [way.prepare(stage.forward) for stage in self.model.stages]
        return Work([self._call], partial(self._scope, way, runs))

    @contextmanager
    def _scope(self, way: Way, runs: list[Callable[..., Any]]) -> Iterator[None]:
        """Each stage runs as prepared."""
        with way.scope(), ExitStack() as stack:
            for stage, run in zip(self.model.stages, runs):
                stack.enter_context(mock.patch.object(stage, "forward", run))
            yield

    def _call(self) -> tuple[Tensor, ...]:
        seeds = range(self.batch)
        labels = torch.arange(self.batch) % self.model.config.num_classes
        images = msf.sample(
            self.model, labels, seeds=seeds, steps=self.steps, guidance_scale=GUIDANCE
        )
        return (images,)

    def replay(self, work: Work, device: torch.device) -> Replay:
        """As a user calls it: what the host takes to launch a step is part of the time."""
        return Replay(work)

    def stopwatch(self, device: torch.device) -> Stopwatch:
        return wall_stopwatch(device)
