"""What a training run tells: progress bar, metrics.jsonl, sample grids and the loss plot."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..files import atomic_write
from ..flops import peak_teraflops, stage_costs
from ..images import save_image, to_uint8
from ..progress import bar, say
from .shared_folder import SharedFolder
from .stage import NotFinite, StageTrainer
from .window import TIMES
from .writers import writers

PATIENCE = 10  # steps in a row that are not taken, before the weights are what is wrong
FLOPS_A_MAC = 6  # a multiplication and an addition, and the backward has twice the forward's

SHOWN = {
    "loss": "{:.4f}",
    "validation_loss": "{:.4f}",
    "gradient_norm": "{:.2f}",
    "images_per_second": "{:.0f}",
    "mfu": "{:.0%}",
    "memory_gib": "{:.1f}",
}


class Recorder:
    """A Recorder records in ``folder`` what the ``window`` of ``trainer`` holds."""

    def __init__(self, trainer: StageTrainer, folder: SharedFolder, progress: bool) -> None:
        self.trainer, self.folder = trainer, folder
        config = trainer.model.config
        self._flops = FLOPS_A_MAC * stage_costs(config)[trainer.index].macs  # of an image's step
        on_gpu = trainer.device.type == "cuda"
        self._peak = on_gpu and peak_teraflops(torch.cuda.get_device_name(trainer.device))
        self.writers = writers(trainer, folder.path) if trainer.ranks.is_first else []
        self._shown: dict[str, str] = {}  # in the bar; some are not told each time
        self.bar = bar(
            trainer.name,
            trainer.total_steps,
            done=trainer.step_number,
            row=trainer.index,
            shown=progress and trainer.ranks.is_first,
        )
        self.start_clock()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for writer in self.writers:
            writer.close()

    def start_window(self) -> None:
        """Begin to average and to measure the rate anew."""
        self.trainer.window.clear()
        self.trainer.guard.count_anew()
        self.start_clock()

    def start_clock(self) -> None:
        """Begin to measure the rate anew."""
        self.images, self.start = 0, time.perf_counter()

    def add(self, images: int) -> None:
        """Count one step's images; no host synchronisation."""
        self.images += images
        self.bar.update()

    @property
    def is_due(self) -> bool:
        """Return whether the last step gets a line: by its number alone, so that a run that was
        stopped has the lines of one that was not."""
        step, config = self.trainer.step_number, self.trainer.config
        intervals = (config.log_every, config.sample_every, config.checkpoint_interval)
        return step == self.trainer.total_steps or any(step % n == 0 for n in intervals)

    def check(self) -> None:
        """Raise NotFinite when no step was taken for PATIENCE steps, in however many windows: how
        often losses are logged must not change what is trained."""
        if self.trainer.window.steps:
            self._check(self._losses()[0], self.trainer.guard.skipped())

    def _check(self, loss: float | None, skipped: int) -> bool:
        """Return whether any step of the window was taken, and raise what ``check`` does."""
        trainer, steps = self.trainer, self.trainer.window.steps
        if loss is not None and skipped < steps:
            return True
        if trainer.window.untaken + steps >= PATIENCE:
            raise NotFinite(
                f"{trainer.name}: the loss became {math.nan if loss is None else loss:.4g} before "
                f"step {trainer.step_number}; these weights were not saved, try a lower learning "
                "rate"
            )
        return False

    def _losses(self) -> list[float | None]:
        """Return the mean loss of the window's steps, and those of its images in each tenth of the
        times, None where there was none."""
        sums, counts = self.trainer.ranks.sum(self.trainer.window.sums).tolist()
        return [x / n if n else None for x, n in zip(sums, counts)]

    def flush(self, validate: Callable[[], float | None] | None = None) -> bool:
        """Record the steps since the last time, and what ``validate`` returns. Return whether any
        of them was taken, and raise what ``check`` does."""
        trainer, steps = self.trainer, self.trainer.window.steps
        if not steps:
            return True
        skipped = trainer.guard.skipped()
        if skipped and trainer.ranks.is_first:
            say(
                f"{trainer.name}: {skipped} of {steps} steps before step {trainer.step_number} "
                "were not taken"
            )
        loss, *by_time = self._losses()
        taken = self._check(loss, skipped)
        trainer.window.untaken = 0 if taken else trainer.window.untaken + steps
        if loss is not None:
            self._record(self._values(loss, by_time, skipped, validate))
        self.start_window()
        return taken

    def _values(
        self,
        loss: float,
        by_time: list[float | None],
        skipped: int,
        validate: Callable[[], float | None] | None,
    ) -> dict[str, Any]:
        trainer = self.trainer
        images = self.images * trainer.ranks.count / (time.perf_counter() - self.start)
        values: dict[str, Any] = {
            "loss": loss,
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],  # of the last step
            "images_per_second": images,
            "gradient_norm": trainer.guard.average_norm(),
            "teraflops": images * self._flops / 1e12,
            "skipped_steps": skipped,
            "loss_by_time": by_time,
        }
        if trainer.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(trainer.device) / 2**30
        if validate and (validation_loss := validate()) is not None:
            values["validation_loss"] = validation_loss
        if self._peak:
            values["mfu"] = values["teraflops"] / (self._peak * trainer.ranks.count)
        return values

    def _record(self, values: dict[str, Any]) -> None:
        step = self.trainer.step_number
        self.folder.log(stage=self.trainer.name, step=step, **values)
        self.start_window()  # now, as where a writer fails the same must not be recorded again
        for writer in self.writers:
            writer.scalars(_flat(values), step)
        self._shown |= {
            name: form.format(values[name]) for name, form in SHOWN.items() if name in values
        }
        self.bar.set_postfix(**self._shown)

    def picture(self, grid: Tensor) -> None:
        """Keep a sample grid (C, h, w) in [-1, 1], C 1 or 3."""
        trainer = self.trainer
        name = f"samples-{trainer.name}-{trainer.step_number:06d}.png"
        save_image(self.folder.path / name, grid)
        for writer in self.writers:
            writer.picture(to_uint8(grid), trainer.step_number)


def _flat(values: dict[str, Any]) -> dict[str, float]:
    """Return ``values`` with a name for each time that there is a loss of: that where its tenth
    begins."""
    parts = enumerate(values["loss_by_time"])
    by_time = {f"loss_by_time/{i / TIMES:g}": x for i, x in parts if x is not None}
    return {**{k: x for k, x in values.items() if k != "loss_by_time"}, **by_time}


def plot_losses(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the losses of every stage against its step."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in metrics:
        stage, step = row["stage"], row["step"]
        lines[stage].append((step, row["loss"]))
        if "validation_loss" in row:
            lines[f"{stage}, validation"].append((step, row["validation_loss"]))
    for name, points in lines.items():
        axes.plot(*zip(*points), marker=".", label=name)  # one point has no line
    axes.set(xlabel="step", ylabel="velocity loss (mean squared error)")
    if lines:  # else all of metrics.jsonl was lost
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
