"""One stage's training: its step, and the state that a step changes."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..checks import check_kind
from ..files import atomic_write
from ..model import MSF
from ..modes import own_modes
from ..parsing import parse_whole
from ..precision import autocast
from ..sampling import check_model
from ..seeds import generator
from ..transformer import StageTransformer
from ..weights import whole
from .config import TrainingConfig
from .guard import Guard
from .interrupts import uncut
from .parallel import checkpointed, distribute, like, parted, synchronised
from .ranks import ONE_PROCESS, Ranks
from .state import check_step, known_average, load_part, read_state, write_state
from .window import TIMES, Window, by_time


class NotFinite(ValueError):
    """The loss or the weights hold NaN or infinity; such weights are not saved."""


class StageTrainer:
    """A StageTrainer trains ``model.stages[index]``; ``ema`` is its averaged copy, which is sampled
    and kept, and ``averages`` are that and those of ``config.extra_ema_decays``, by their decay.

    In a job of several processes every one has a StageTrainer, and ``ranks`` says which it is.

    Raise ValueError where the model has no such stage or its weights are not float32, TypeError for
    another model or config.
    """

    @own_modes()
    def __init__(
        self, model: MSF, index: int, config: TrainingConfig, ranks: Ranks = ONE_PROCESS
    ) -> None:
        check_model(model, "StageTrainer")
        check_kind(config, TrainingConfig, "StageTrainer: config")
        count = len(model.stages)
        if parse_whole(index, "StageTrainer: index", 0) >= count:
            raise ValueError(f"StageTrainer: index must be below {count}, got {index}")
        self.model, self.index, self.config, self.ranks = model, index, config, ranks
        self.name = model.config.stage_names[index]
        self.device = model.pyramid.mean.device
        self.stage = cast(StageTransformer, model.stages[index])
        for parameter in self.stage.parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"StageTrainer: weights must be float32, got {parameter.dtype}; train "
                    "model.float(), and choose by config.precision what to compute in"
                )
        self.averages = {
            decay: copy.deepcopy(self.stage).requires_grad_(False)
            for decay in (config.ema_decay, *config.extra_ema_decays)
        }
        self.ema = self.averages[config.ema_decay]
        checkpointed(self.stage.blocks, config.checkpointing)
        if config.compile:
            for block in self.stage.blocks:
                block.compile()
        self._called = distribute(self.stage, list(self.averages.values()), config, ranks)
        model.stages[index] = self._called
        self.parameters: list[Tensor] = list(self.stage.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.guard = Guard(config.spike, self.device)
        self.window = Window(self.device)
        self.gradient_norm = torch.zeros((), device=self.device)  # of the last step
        self.step_number = 0
        self.is_torn = False  # whether a step failed with some of its changes made

    @property
    def total_steps(self) -> int:
        return self.config.steps[self.index]

    def learning_rate(self) -> float:
        step, config = self.step_number, self.config
        rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
        if config.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.total_steps))
        return rate

    @own_modes()
    def step(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Take one step on images (B, C, H, W), this process's part of the batch, and return their
        loss (detached, on the device).

        The step is not taken where the guard finds its gradient spoilt.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss, parts = self._backward(images, labels)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        self.gradient_norm = whole(norm)
        with uncut():
            self.is_torn = True
            self.optimizer.found_inf = self.guard.judge(self.gradient_norm)  # type: ignore[attr-defined]
            self.optimizer.step()
            self.step_number += 1
            self.window.add(loss, parts)
            self._average()
            self.is_torn = False
        self.optimizer.zero_grad()
        return loss

    def _backward(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the gradients, in ``config.accumulation`` parts, and return the mean loss, and
        those of images ``by_time``.

        All random numbers of part p of all processes' parts are a function of (seed, stage, step,
        p): two processes draw what one draws with twice the accumulation.
        """
        parts = self.config.accumulation
        first, total = self.ranks.rank * parts, torch.zeros((), device=self.device)
        sums = torch.zeros(2, TIMES, dtype=torch.float64, device=self.device)
        for part, (x, y) in enumerate(_parts(images, labels, parts)):
            key = (self.index, self.step_number, *([first + part] if first + part else []))
            random = generator(self.config.seed, *key, device=self.device)
            with synchronised(self._called, last=part == parts - 1):
                with autocast(self.device, self.config.precision):
                    losses, times = self.model.image_losses(x, y, stage=self.name, generator=random)
                (losses.mean() / parts).backward()
            total += losses.detach().mean() / parts
            sums += by_time(losses.detach(), times)
        return total, sums

    @torch.no_grad()
    def _average(self) -> None:
        # A young average forgets faster, so that it does not remember the initialisation.
        young = (1 + self.step_number) / (10 + self.step_number)
        parameters = _here(self.parameters)
        for decay, average in self.averages.items():
            torch._foreach_lerp_(_here(average.parameters()), parameters, 1 - min(decay, young))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model use the averaged weights in the body."""
        self.model.stages[self.index] = self.ema
        try:
            yield
        finally:
            self.model.stages[self.index] = self._called
            parted(self.ema)

    @torch.no_grad()
    def copy_average(self, stage: nn.Module) -> None:
        """Copy the averaged weights into ``stage``, in the first process; all call it."""
        targets = stage.state_dict()
        for name, x in self.ema.state_dict().items():
            x = whole(x)
            if self.ranks.is_first:
                targets[name].copy_(x)

    def check_finite(self) -> None:
        """Raise NotFinite when the averaged weights, which never forget one, hold NaN or
        infinity."""
        norms = torch._foreach_norm(_here(self.ema.parameters()))
        if self.ranks.any(not bool(torch.stack(norms).isfinite().all())):
            raise NotFinite(
                f"{self.name}: the weights are not finite after step {self.step_number}; "
                "they were not saved, try a lower learning rate"
            )

    def state(self) -> dict[str, Tensor]:
        """Return everything a step changes, as one flat dictionary of whole tensors on the CPU.

        All processes call it; those that are not the first get an empty one.
        """
        tensors = dict(self._tensors())
        return tensors if self.ranks.is_first else {}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        parts: dict[str, nn.Module] = {"weights": self.stage, "ema": self.ema}
        parts |= {f"ema-{decay}": self.averages[decay] for decay in self.config.extra_ema_decays}
        # With these the states of all stages are enough to rebuild the model.
        parts |= {"pyramid": self.model.pyramid}
        for part, module in parts.items():
            for name, x in module.state_dict().items():
                yield self._kept(f"{part}.{name}", x)
        for name, parameter in self.stage.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield self._kept(f"optimizer.{key}.{name}", value)
        yield self._kept("guard", self.guard.state)
        yield self._kept("window.sums", self.ranks.sum(self.window.sums))
        counts = torch.tensor(
            [self.window.steps, self.window.untaken], dtype=torch.float64, device="cpu"
        )
        yield self._kept("window.counts", counts)

    def _kept(self, name: str, x: Tensor) -> tuple[str, Tensor]:
        x = whole(x)  # which every process has to call, also where it keeps nothing
        return name, x.detach().cpu().contiguous() if self.ranks.is_first else x.new_empty(0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``state()``, whole or not at all; all processes call this, and the first writes."""
        state = self.state()
        if self.ranks.is_first:
            with atomic_write(path) as temporary:
                write_state(temporary, state, self.step_number)

    @own_modes()
    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from what ``save`` wrote, with any number of processes. Raise ValueError if it
        is corrupt or does not fit."""
        path = Path(path)
        tensors, step = read_state(path)
        check_step(path, step, self.total_steps)
        self._restore(tensors, path)
        self.step_number = step

    @own_modes()
    def roll_back(self, path: str | os.PathLike[str]) -> None:
        """Take the weights, and all else that steps change, back to what ``save`` wrote. The number
        of the step stays, so that the data and random numbers that spoilt them are not met again.
        """
        step = self.step_number
        self.load(path)
        self.step_number = step
        self.guard.forget()
        self.window = Window(self.device)

    def _restore(self, tensors: dict[str, Tensor], path: Path) -> None:
        load_part(self.stage, "weights.", tensors, path)
        for decay, average in self.averages.items():
            part = "ema" if average is self.ema else f"ema-{decay}"
            load_part(average, known_average(part, tensors), tensors, path)
        for name, parameter in self.stage.named_parameters():
            shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            for key, shape in shapes.items():
                value = tensors.get(f"optimizer.{key}.{name}")
                if value is None or value.shape != shape:
                    found = "none" if value is None else list(value.shape)
                    raise ValueError(
                        f"{path}: optimizer.{key}.{name} must have shape {list(shape)}, got {found}"
                    )
                held = value.to(self.device) if key == "step" else like(value, parameter)
                self.optimizer.state[parameter][key] = held
        if "guard" in tensors:
            self.guard.state = tensors["guard"].to(self.device)
        if "window.sums" in tensors:  # of all processes
            self.window.sums = tensors["window.sums"].to(self.device) * self.ranks.is_first
            self.window.steps, self.window.untaken = map(int, tensors["window.counts"])


def _parts(
    images: Tensor, labels: Tensor | None, count: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (images, labels) of ``count`` equal parts. Raise ValueError where they are not."""
    if len(images) % count:
        raise ValueError(
            f"StageTrainer.step: the images must be a multiple of accumulation {count}, "
            f"got {len(images)}"
        )
    parts = [None] * count if labels is None else labels.chunk(count)
    yield from zip(images.chunk(count), parts)


def _here(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return what this process holds of each."""
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
