"""Training: every stage in turn, on its own, with logs, sample grids and checkpoints."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config import MSFConfig
from ..data import ImageData, load_data
from ..images import component_grid
from ..model import MSF
from ..sampling import sample_components
from ..seeds import generator
from .batches import batches
from .config import RunConfig, TrainingConfig
from .folder import RunFolder
from .interrupts import Interrupted, StopSignal
from .recorder import Recorder, plot_losses
from .skipped import ReadableBatches, Skipped
from .stage import StageTrainer

STATISTICS_IMAGES = 16_384
PREVIEW_IMAGES = 25
PREVIEW_STEPS = 50


def train(
    config: MSFConfig,
    training: TrainingConfig,
    source: str,
    out: str | os.PathLike[str],
    *,
    stages: Sequence[str] | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> MSF:
    """Train ``stages`` (all by default) of a model on ``source`` into the folder ``out``, and
    return the model that is there at the end. Stages train independently: other processes may train
    others into ``out`` at the same time.

    source: as in ``load_data``. resume: continue the run that ``out`` holds, if any; the result is
    bit for bit that of an uninterrupted run on the same machine. Raises ``Interrupted`` when
    stopped by Ctrl-C, ValueError for settings that do not fit together or when more than one in a
    hundred images cannot be read; fewer are skipped, and named at the end.
    """
    names = config.stage_names
    for name in stages or ():
        if name not in names:
            raise ValueError(f"stage must be one of {', '.join(names)}, got {name!r}")
    if len(training.steps) != len(names):
        raise ValueError(
            f"training steps must be {len(names)} numbers, one a stage, got {training.steps}"
        )
    data = load_data(
        source,
        split="train",
        image_size=config.image_size,
        channels=config.channels,
        num_classes=config.num_classes,
    )
    folder = RunFolder(Path(out), config, RunConfig(source, training), resume=resume)
    skipped = Skipped(data.total, data.empty_files)
    torch.manual_seed(training.seed)
    model = MSF(config)
    saved = folder.saved_model()
    if saved is None:
        model.pyramid.measure(_statistics_batches(data, training.seed, skipped))
    else:  # images added since must not change the statistics
        model.pyramid.load_state_dict(saved.pyramid.state_dict())
    model.to(device)
    averaged = (saved or copy.deepcopy(model)).to(device).requires_grad_(False).eval()
    chosen = [index for index, name in enumerate(names) if stages is None or name in stages]
    trainers = [StageTrainer(model, index, training) for index in chosen]
    with folder.training([trainer.name for trainer in trainers]):
        for trainer in trainers:
            folder.load(trainer)
            averaged.stages[trainer.index] = trainer.ema
        with StopSignal() as stop:
            for trainer in trainers:
                _train_stage(trainer, data, folder, averaged, stop, skipped, progress)
    skipped.report()
    plot_losses(folder.metrics(), folder.path / "loss.png")
    # The saved one, because another process may have trained the other stages meanwhile.
    return (folder.saved_model() or averaged).to(device).requires_grad_(False)


def _statistics_batches(data: ImageData, seed: int, skipped: Skipped) -> Iterator[Tensor]:
    key, readable = generator(seed), ReadableBatches(data)
    for indices in torch.randperm(len(data), generator=key)[:STATISTICS_IMAGES].split(512):
        images, _, problems = readable[indices]
        skipped.add(problems)
        yield images


def _train_stage(
    trainer: StageTrainer,
    data: ImageData,
    folder: RunFolder,
    averaged: MSF,
    stop: StopSignal,
    skipped: Skipped,
    progress: bool,
) -> None:
    config, first, last = trainer.config, trainer.step_number, trainer.total_steps
    has_labels = trainer.model.config.num_classes > 0
    loaded = batches(
        data,
        config.batch_size,
        first,
        last,
        config.seed,
        skipped=skipped,
        pin=trainer.device.type == "cuda",
    )
    with Recorder(trainer, folder, progress) as recorder:
        for images, labels in loaded:
            images = images.to(trainer.device, non_blocking=True)
            labels = labels.to(trainer.device, non_blocking=True)
            loss = trainer.step(images, labels if has_labels else None)
            recorder.add(loss, len(images))
            step = trainer.step_number
            if stop.received or step == last or step % config.sample_every == 0:
                recorder.flush()
                folder.save(trainer, averaged)
                if averaged.config.channels in (1, 3):  # latents are no picture
                    recorder.picture(preview(averaged, trainer.index, data))
                recorder.start_window()  # the time of a checkpoint is not that of training
            if stop.received:
                raise Interrupted(
                    f"stopped at step {step} of {last} of {trainer.name}; "
                    f"saved in {folder.path}, continue with --resume"
                )


@torch.no_grad()
def preview(model: MSF, index: int, data: ImageData) -> Tensor:
    """Return a grid (C, h, w) of samples of the stages up to ``index``, above true bases where the
    base is untrained."""
    indices = torch.arange(PREVIEW_IMAGES) * len(data) // PREVIEW_IMAGES
    images, labels, _ = ReadableBatches(data)[indices]
    true_base = model.pyramid.split(images.to(model.pyramid.mean.device))[0]
    _, components = sample_components(
        model,
        labels if model.config.num_classes else None,
        seeds=range(PREVIEW_IMAGES),
        steps=tuple(min(steps, PREVIEW_STEPS) for steps in model.config.steps),
        base=true_base if "base" in model.untrained_stages else None,
    )
    return component_grid(model, components[: index + 1])
