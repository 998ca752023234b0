"""Where a stage's losses and sample grids go besides its run's folder."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..files import atomic_write
from .stage import StageTrainer


class Writer(Protocol):
    """A Writer takes the values of a step by their names, and grids (C, h, w) uint8."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, grid: Tensor, step: int) -> None: ...

    def close(self) -> None: ...


def writers(trainer: StageTrainer, folder: Path) -> list[Writer]:
    """Return TensorBoard's, and that of Weights & Biases where a project is named."""
    found: list[Writer] = [TensorBoard(trainer, folder)]
    if trainer.config.wandb:
        found.append(WeightsAndBiases(trainer, folder))
    return found


class TensorBoard:
    """TensorBoard writes ``tensorboard/<stage>``."""

    def __init__(self, trainer: StageTrainer, folder: Path) -> None:
        # Each stage has a folder: purging hides the points of all tags from that step on.
        logs = str(folder / "tensorboard" / trainer.name)
        self._writer = SummaryWriter(logs, purge_step=trainer.step_number + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, grid: Tensor, step: int) -> None:
        self._writer.add_image("samples", grid, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """WeightsAndBiases logs to the project ``config.wandb``, a run for each stage of a folder,
    which is continued where training is."""

    def __init__(self, trainer: StageTrainer, folder: Path) -> None:
        self._wandb = imported()
        name = folder / "tensorboard" / trainer.name / "wandb.txt"
        if not name.exists():
            with atomic_write(name) as temporary:
                temporary.write_text(secrets.token_hex(8))
        self._run: Any = self._wandb.init(
            project=trainer.config.wandb,
            id=name.read_text(),
            resume="allow",
            group=folder.resolve().name,
            name=f"{folder.resolve().name}-{trainer.name}",
            dir=str(folder),
            config={"model": trainer.model.config.to_dict(), "training": asdict(trainer.config)},
        )
        # Steps that are repeated after a crash are behind the run's own counter, which only grows.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def picture(self, grid: Tensor, step: int) -> None:
        image = self._wandb.Image(grid.permute(1, 2, 0).squeeze(-1).numpy())
        self._run.log({"samples": image, "step": step})

    def close(self) -> None:
        self._run.finish()


def imported() -> Any:
    """Return the module wandb. Raise ImportError with one line where it is missing."""
    try:
        import wandb
    except ImportError:
        raise ImportError("--wandb needs wandb: pip install wandb") from None
    return wandb
