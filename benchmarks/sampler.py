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

from .arms import Arm
from .modelcall import ModelCall
from .results import Row
from .timing import Work
from .transformers import EAGER

GUIDANCE = 1.5  # DiT's
CHECKED = 4  # images of a batch: float32 is slow, and an image does not depend on its batch


def random_model(name: str, device: torch.device) -> msf.MSF:
    """Build a preset's model with random weights, even those that start as zeros and hide all."""
    with device:
        model = msf.MSF(msf.preset(name).model)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.pyramid.std.fill_(0.5)  # as if measured
    return model


def images_shape(name: str, batch: int) -> tuple[int, ...]:
    """Return the shape (B, C, H, W) of a preset's images."""
    config = msf.preset(name).model
    return batch, config.channels, *config.image_size


@dataclass(frozen=True)
class Sampling(ModelCall):
    """A Sampling is one call that makes the images of the seeds 0 .. batch - 1.

    `steps` has one number for each stage.
    """

    name: str
    model: msf.MSF
    steps: tuple[int, ...]
    batch: int

    @classmethod
    def draw(cls, name: str, steps: tuple[int, ...], batch: int, device: torch.device) -> Sampling:
        """Draw random weights in bfloat16."""
        model = random_model(name, device)
        for stage in model.stages:
            stage.bfloat16()  # autocast would cast every weight anew in a compiled step
        return cls(name, model, steps, batch)

    @property
    def row(self) -> Row:
        macs = sum(cost.macs_per_image for cost in stage_costs(self.model.config, self.steps))
        # A MAC is a multiplication and an addition, made with and without the label.
        flops, steps = 2 * 2 * self.batch * macs, sum(self.steps)
        return Row(
            "sampling",
            f"sampling {self.name}",
            images_shape(self.name, self.batch),
            "bfloat16",
            0,
            flops,
            images=self.batch,
            steps=steps,
        )

    def exact(self) -> tuple[Tensor, ...]:
        """Return the first images in float32."""
        model = copy.deepcopy(self.model).float()
        few = replace(self, model=model, batch=min(self.batch, CHECKED))
        return few.results(EAGER)

    def results(self, arm: Arm) -> tuple[Tensor, ...]:
        (images,) = super().results(arm)
        return (images[:CHECKED],)

    def make_work(self, arm: Arm) -> Work:
        runs = [arm.prepare(stage.forward) for stage in self.model.stages]
        return Work([self._call], partial(self._scope, arm, runs))

    @contextmanager
    def _scope(self, arm: Arm, runs: list[Callable[..., Any]]) -> Iterator[None]:
        """Make each stage run as the arm prepared it."""
        with arm.scope(), ExitStack() as stack:
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
