"""One optimizer step of every stage of a model, as the trainer takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import msf
from msf.flops import stage_costs
from msf.training.stage import StageTrainer
from msf.transformer import Block

from .arms import Arm
from .modelcall import ModelCall
from .results import Row
from .sampler import random_model
from .timing import Work
from .transformers import EAGER

CHUNK = 8  # images: float32 activations of all 128 of an XL batch would take some 90 GB

# The benchmark compares gradients, so a step must neither clip them nor move the weights: the norm
# is computed and the averages are kept at the same cost, but every call is the same step.
SETTINGS = msf.TrainingConfig(steps=(1,), precision="bf16", clip=1e9, learning_rate=1e-30)


@dataclass(frozen=True)
class TrainingStep(ModelCall):
    """A TrainingStep takes a step of each stage, one after the other, on the same images.

    A call returns the losses and all gradients. Each stage draws its noise from the same seed in
    every call.

    Args:
        trainers: one for each stage; they hold the optimizer's state and the averaged weights.
        images: (B, C, H, W) in float32.
        labels: (B,).
    """

    name: str
    trainers: tuple[StageTrainer, ...]
    images: Tensor
    labels: Tensor

    @classmethod
    def draw(cls, name: str, batch: int, device: torch.device) -> TrainingStep:
        """Draw random weights and images. Allocate AdamW's state here, so that no arm does."""
        model = random_model(name, device)
        config = model.config
        images = torch.randn(batch, config.channels, *config.image_size, device=device)
        labels = torch.arange(batch, device=device) % config.num_classes
        step = cls(name, _trainers(model, SETTINGS), images, labels)
        replace(step, images=images[:1], labels=labels[:1]).results(EAGER)
        return step

    @property
    def model(self) -> msf.MSF:
        return self.trainers[0].model

    @property
    def row(self) -> Row:
        batch, costs = len(self.images), stage_costs(self.model.config)
        # A MAC is a multiplication and an addition; a backward has twice those of its forward.
        flops = 2 * 3 * batch * sum(cost.macs for cost in costs)
        name, shape = f"training step {self.name}", tuple(self.images.shape)
        return Row("training step", name, shape, "bfloat16", 0, flops, images=batch)

    def exact(self) -> tuple[Tensor, ...]:
        """Return losses and gradients in float32, with activations of a few images at a time."""
        single = replace(SETTINGS, precision="fp32")
        with ExitStack() as stack:
            for stage in self.model.stages:
                forward = partial(_in_chunks, stage.forward)
                stack.enter_context(mock.patch.object(stage, "forward", forward))
            return replace(self, trainers=_trainers(self.model, single)).results(EAGER)

    def make_work(self, arm: Arm) -> Work:
        """Make each block run as prepared. The blocks of a stage share one compilation."""
        return Work([self._call], partial(self._scope, arm, arm.prepare(Block.forward)))

    @contextmanager
    def _scope(self, arm: Arm, run: Callable[..., Any]) -> Iterator[None]:
        with arm.scope(), ExitStack() as stack:
            for module in self.model.modules():
                if isinstance(module, Block):
                    stack.enter_context(mock.patch.object(module, "forward", partial(run, module)))
            yield

    def _call(self) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for trainer in self.trainers:
            trainer.step_number = 0
            with _gradients(trainer, results):
                results.append(trainer.step(self.images, self.labels)[None])
        return tuple(results)


def _trainers(model: msf.MSF, settings: msf.TrainingConfig) -> tuple[StageTrainer, ...]:
    stages = range(len(model.stages))
    settings = replace(settings, steps=settings.steps * len(stages))
    return tuple(StageTrainer(model, stage, settings) for stage in stages)


@contextmanager
def _gradients(trainer: StageTrainer, results: list[Tensor]) -> Iterator[None]:
    """Add the gradients that the optimizer is given to the results; its step drops them."""

    def keep(*_: Any) -> None:
        gradients = (parameter.grad for parameter in trainer.parameters)
        results.extend(gradient for gradient in gradients if gradient is not None)

    handle = trainer.optimizer.register_step_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _in_chunks(forward: Callable[..., Tensor], x: Tensor, *inputs: Tensor | None) -> Tensor:
    """Run a stage's forward on a few images at a time; the backward repeats it for each."""
    parts = x.split(CHUNK)
    others = [repeat(None) if other is None else other.split(CHUNK) for other in inputs]
    chunks = zip(parts, *others)
    return torch.cat([checkpoint(forward, *chunk, use_reentrant=False) for chunk in chunks])
