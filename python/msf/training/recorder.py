"""The output of a training run: progress bar, metrics.jsonl, TensorBoard, sample grids and the loss
plot."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..files import atomic_write
from ..images import save_image, to_uint8
from ..progress import bar
from .folder import RunFolder
from .stage import NotFinite, StageTrainer


class Recorder:
    """A Recorder averages losses over ``log_every`` steps of ``trainer`` and records them in
    ``folder``."""

    def __init__(self, trainer: StageTrainer, folder: RunFolder, progress: bool) -> None:
        self.trainer, self.folder = trainer, folder
        # Each stage has a folder: purging hides the points of all tags from that step on.
        self.writer = SummaryWriter(
            str(folder.path / "tensorboard" / trainer.name), purge_step=trainer.step_number + 1
        )
        self.bar = bar(
            trainer.name,
            trainer.total_steps,
            done=trainer.step_number,
            row=trainer.index,
            shown=progress,
        )
        self.start_window()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.writer.close()

    def start_window(self) -> None:
        """Begin to average and to measure the rate anew."""
        self.loss = torch.zeros((), device=self.trainer.device)
        self.steps, self.images, self.start = 0, 0, time.perf_counter()

    def add(self, loss: Tensor, images: int) -> None:
        """Add one step's loss; no host synchronisation until the window is full."""
        self.loss += loss
        self.steps += 1
        self.images += images
        self.bar.update()
        if self.steps == self.trainer.config.log_every:
            self.flush()

    def flush(self) -> None:
        """Record the steps since the last time. Raise NotFinite when the loss is."""
        if not self.steps:
            return
        trainer, loss = self.trainer, float(self.loss) / self.steps
        step = trainer.step_number
        if not math.isfinite(loss):
            raise NotFinite(
                f"{trainer.name}: the loss became {loss} before step {step}; "
                "these weights were not saved, try a lower learning rate"
            )
        values = {
            "loss": loss,
            "learning_rate": trainer.learning_rate(),
            "images_per_second": self.images / (time.perf_counter() - self.start),
        }
        self.folder.log(stage=trainer.name, step=step, **values)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.bar.set_postfix(loss=f"{loss:.4f}")
        self.start_window()

    def picture(self, grid: Tensor) -> None:
        """Keep a sample grid (C, h, w) in [-1, 1], C 1 or 3."""
        trainer = self.trainer
        name = f"samples-{trainer.name}-{trainer.step_number:06d}.png"
        save_image(self.folder.path / name, grid)
        self.writer.add_image("samples", to_uint8(grid), trainer.step_number)


def plot_losses(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the loss of every stage against its step."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    stages: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in metrics:
        stages[row["stage"]].append((row["step"], row["loss"]))
    for stage, points in stages.items():
        axes.plot(*zip(*points), marker=".", label=stage)  # one point has no line
    axes.set(xlabel="step", ylabel="velocity loss (mean squared error)")
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
