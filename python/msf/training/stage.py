"""One stage's training: its step, and the state that a step changes."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import check_is_file
from ..model import MSF
from ..modes import own_modes
from ..precision import autocast
from ..seeds import generator
from ..weights import check_tensors
from .config import TrainingConfig
from .interrupts import uncut


class NotFinite(ValueError):
    """The loss or the weights hold NaN or infinity; such weights are not saved."""


class StageTrainer:
    """A StageTrainer trains ``model.stages[index]``; ``ema`` is its averaged copy, which is sampled
    and kept."""

    def __init__(self, model: MSF, index: int, config: TrainingConfig) -> None:
        self.model, self.index, self.config = model, index, config
        self.name = model.config.stage_names[index]
        self.device = model.pyramid.mean.device
        self.stage = model.stages[index]
        self.ema = copy.deepcopy(self.stage).requires_grad_(False)
        self.parameters: list[Tensor] = list(self.stage.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
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
        """Take one step on images (B, C, H, W) and return the loss (detached, on the device)."""
        key = (self.config.seed, self.index, self.step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with autocast(self.device, self.config.precision):
            losses = self.model.training_losses(
                images, labels, stage=self.name, generator=generator(*key, device=self.device)
            )
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        with uncut():
            self.is_torn = True
            self.optimizer.step()
            self.step_number += 1
            self._average()
            self.is_torn = False
        self.optimizer.zero_grad()
        return losses["total"].detach()

    @torch.no_grad()
    def _average(self) -> None:
        # A young average forgets faster, so that it does not remember the initialisation.
        decay = min(self.config.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        averages: list[Tensor] = list(self.ema.parameters())
        torch._foreach_lerp_(averages, self.parameters, 1 - decay)

    def check_finite(self) -> None:
        """Raise NotFinite when the averaged weights, which never forget one, hold NaN or
        infinity."""
        norms = torch._foreach_norm(list(self.ema.parameters()))
        if not torch.stack(norms).isfinite().all():
            raise NotFinite(
                f"{self.name}: the weights are not finite after step {self.step_number}; "
                "they were not saved, try a lower learning rate"
            )

    def state(self) -> dict[str, Tensor]:
        """Return everything a step changes, as one flat dictionary of tensors."""
        tensors = {f"weights.{k}": v for k, v in self.stage.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        # With these the states of all stages are enough to rebuild the model.
        tensors |= {f"pyramid.{k}": v for k, v in self.model.pyramid.state_dict().items()}
        for name, parameter in self.stage.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return {k: v.contiguous() for k, v in tensors.items()}

    def save(self, path: Path) -> None:
        save_file(self.state(), path, metadata={"step": str(self.step_number)})

    def load(self, path: Path) -> None:
        """Continue from what ``save`` wrote. Raise ValueError if it is corrupt or does not fit."""
        tensors, step = _read(path, self.device)
        hint = (
            "; a stage cannot have fewer steps than it has taken" if step > self.total_steps else ""
        )
        if not 1 <= step <= self.total_steps:
            raise ValueError(
                f"{path}: its step must be from 1 to {self.total_steps}, got {step}" + hint
            )
        self._restore(tensors, path)
        self.step_number = step

    def _restore(self, tensors: dict[str, Tensor], path: Path) -> None:
        _load_part(self.stage, "weights.", tensors, path)
        _load_part(self.ema, "ema.", tensors, path)
        for name, parameter in self.stage.named_parameters():
            shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            for key, shape in shapes.items():
                value = tensors.get(f"optimizer.{key}.{name}")
                if value is None or value.shape != shape:
                    found = "none" if value is None else list(value.shape)
                    raise ValueError(
                        f"{path}: optimizer.{key}.{name} must have shape {list(shape)}, got {found}"
                    )
                self.optimizer.state[parameter][key] = value


def load_average(path: Path, model: MSF, index: int) -> None:
    """Load averaged weights and statistics of the state at ``path`` into ``model`` and its stage
    ``index``. Raise ValueError when it is corrupt or does not fit."""
    tensors, _ = _read(path, torch.device("cpu"))
    _load_part(model.stages[index], "ema.", tensors, path)
    _load_part(model.pyramid, "pyramid.", tensors, path)


def _read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of a state and its step."""
    check_is_file(path)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            step = int(file.metadata()["step"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable training state ({error})") from None
    check_tensors(tensors, path)
    return tensors, step


def _load_part(module: nn.Module, prefix: str, tensors: dict[str, Tensor], path: Path) -> None:
    part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        module.load_state_dict(part)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise ValueError(f"{path}: made by another configuration: {detail}") from None
