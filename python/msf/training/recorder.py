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
from ..flops import peak_teraflops, stage_costs
from ..images import save_image, to_uint8
from ..progress import bar, say
from .shared_folder import SharedFolder
from .stage import NotFinite, StageTrainer

FLOPS_A_MAC = 6  # a multiplication and an addition, and the backward has twice the forward's


class Recorder:
    """A Recorder averages losses over ``log_every`` steps of ``trainer`` and records them in
    ``folder``."""

    def __init__(self, trainer: StageTrainer, folder: SharedFolder, progress: bool) -> None:
        self.trainer, self.folder = trainer, folder
        config = trainer.model.config
        self._flops = FLOPS_A_MAC * stage_costs(config)[trainer.index].macs  # of an image's step
        on_gpu = trainer.device.type == "cuda"
        self._peak = on_gpu and peak_teraflops(torch.cuda.get_device_name(trainer.device))
        # Each stage has a folder: purging hides the points of all tags from that step on.
        logs = str(folder.path / "tensorboard" / trainer.name)
        self.writer = (
            SummaryWriter(logs, purge_step=trainer.step_number + 1)
            if trainer.ranks.is_first
            else None
        )
        self.bar = bar(
            trainer.name,
            trainer.total_steps,
            done=trainer.step_number,
            row=trainer.index,
            shown=progress and trainer.ranks.is_first,
        )
        self.start_window()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer:
            self.writer.close()

    def start_window(self) -> None:
        """Begin to average and to measure the rate anew."""
        self.sums = torch.zeros(2, device=self.trainer.device)  # of finite losses, and their number
        self.steps, self.images, self.start = 0, 0, time.perf_counter()

    def add(self, loss: Tensor, images: int) -> None:
        """Add one step's loss; no host synchronisation until the window is full."""
        finite = loss.isfinite()
        self.sums += torch.stack([torch.where(finite, loss, 0), finite.float()])
        self.steps += 1
        self.images += images
        self.bar.update()
        if self.steps == self.trainer.config.log_every:
            self.flush()

    def flush(self) -> None:
        """Record the steps since the last time. Raise NotFinite when none was taken, or had a loss
        that is a number."""
        if not self.steps:
            return
        trainer, skipped = self.trainer, self.trainer.guard.skipped()
        total, count = trainer.ranks.sum(self.sums).tolist()
        step = trainer.step_number
        if not count or skipped == self.steps:
            loss = total / count if count else math.nan
            raise NotFinite(
                f"{trainer.name}: the loss became {loss:.4g} before step {step}; "
                "these weights were not saved, try a lower learning rate"
            )
        images = self.images * trainer.ranks.count / (time.perf_counter() - self.start)
        values = {
            "loss": total / count,
            "learning_rate": trainer.learning_rate(),
            "images_per_second": images,
            "gradient_norm": trainer.guard.average_norm(),
            "teraflops": images * self._flops / 1e12,
            "skipped_steps": skipped,
        }
        if self._peak:
            values["mfu"] = values["teraflops"] / (self._peak * trainer.ranks.count)
        if skipped and trainer.ranks.is_first:
            say(
                f"{trainer.name}: {skipped} of {self.steps} steps before step {step} were not taken"
            )
        self._record(step, values)
        self.start_window()

    def _record(self, step: int, values: dict[str, float]) -> None:
        self.folder.log(stage=self.trainer.name, step=step, **values)
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        device, shown = self.trainer.device, {"loss": f"{values['loss']:.4f}"}
        if device.type == "cuda":
            shown["memory"] = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        self.bar.set_postfix(**shown)

    def picture(self, grid: Tensor) -> None:
        """Keep a sample grid (C, h, w) in [-1, 1], C 1 or 3."""
        assert self.writer
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
