"""Training: every stage in turn, on its own, with logs, sample grids and checkpoints."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config import MSFConfig
from ..data import ImageData, load_data
from ..files import check_outside, check_utf8, printable
from ..model import MSF
from ..modes import own_modes
from ..precision import tf32
from ..progress import follow, say
from ..seeds import generator
from . import writers
from .config import RunConfig, TrainingConfig
from .folder import PLOT
from .identity import fingerprint
from .interrupts import Interrupted, StopSignal
from .loop import Decode, StageLoop
from .ranks import Ranks, started
from .recorder import plot_losses
from .shared_folder import SharedFolder
from .skipped import ReadableBatches, Skipped
from .stage import StageTrainer
from .start import started_from
from .validation import Validation

STATISTICS_IMAGES, STATISTICS_BATCH = 16_384, 512
STATISTICS = (3, 0, 0, 0)  # the purpose of its draws, beside that of ``Validation``
MAX_EPOCHS_A_BATCH = 10  # a batch that is larger is a slip


@own_modes()
@torch.random.fork_rng(devices=[])
def train(
    config: MSFConfig,
    training: TrainingConfig,
    source: str,
    out: str | os.PathLike[str],
    *,
    stages: Sequence[str] | None = None,
    resume: bool = False,
    data_changed: bool = False,
    start: str | os.PathLike[str] = "",
    decode: Decode | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> MSF:
    """Train ``stages`` (all by default) of a model on ``source`` into the folder ``out``, and
    return the model that is there at the end, in a job of several processes in the first. Stages
    train independently: other processes may train others into ``out`` at the same time.

    source: as in ``load_data``. data_changed: continue though classes or files of the data are not
    what they were. start: the folder of a model whose weights a new run begins with, see
    ``started_from``. decode: makes pictures (B, 3, H, W) in [-1, 1] of latents (B, C, h, w), for
    sample grids, which latents otherwise have none of. resume: continue the run that ``out`` holds,
    if any. All of ``training`` but seed and holdout may have changed, and the path of the data;
    else the result is bit for bit that of an uninterrupted run on the same machine.

    Any error after the first step leaves the steps before it saved. So does Ctrl-C, which raises
    ``Interrupted``. Raise ValueError for settings that do not fit together or when more than one in
    a hundred images cannot be read; fewer are skipped, and named at the end. So are held-out ones,
    however many, in the loss on them.
    """
    names = config.stage_names
    if config.prediction == "noise":
        raise ValueError(
            "this model predicts noise, and only velocities are trained; take another, as msf "
            "import makes of SiT"
        )
    for name in stages or ():
        if name not in names:
            raise ValueError(f"stage must be one of {', '.join(names)}, got {name!r}")
    if len(training.steps) != len(names):
        raise ValueError(
            f"training steps must be {len(names)} numbers, one a stage, got {training.steps}"
        )
    if source not in ("digits", "textures"):
        check_outside(Path(out), source)
    check_utf8(out)
    chosen = [index for index, name in enumerate(names) if stages is None or name in stages]
    with started(torch.device(device)) as (ranks, device), tf32(training.precision == "tf32"):
        # In a function of its own, as a group of processes that is gone must not be referred to.
        return _train(
            config,
            training,
            source,
            Path(out),
            chosen,
            ranks,
            device,
            resume=resume,
            data_changed=data_changed,
            start=os.fspath(start),
            decode=decode,
            progress=progress,
        )


def _train(
    config: MSFConfig,
    training: TrainingConfig,
    source: str,
    out: Path,
    chosen: Sequence[int],
    ranks: Ranks,
    device: torch.device,
    *,
    resume: bool,
    data_changed: bool,
    start: str,
    decode: Decode | None,
    progress: bool,
) -> MSF:
    """Train the stages ``chosen`` in the process of ``ranks``; see ``train``."""
    if training.wandb:
        writers.imported()  # rather than miss it after the statistics
    data = ranks.each(lambda: _data(config, training, source))
    steps = {config.stage_names[index]: training.steps[index] for index in chosen}
    notes = ranks.each(lambda: _doubtful(training, steps, len(data), ranks.count))
    validation = _validation(data, training)
    folder = SharedFolder(
        ranks,
        out,
        config,
        RunConfig(source, training, data.class_names, fingerprint(data.files), start),
        resume=resume,
        data_changed=data_changed,
        files=data.files,
        digest=data.digest,
    )
    skipped = Skipped(data.total, data.empty_files)
    held_out = validation.problems if validation else {}
    model, initial = _models(config, training.seed, data, folder, skipped, start, progress)
    model.to(device)
    averaged = copy.deepcopy(initial).requires_grad_(False).eval()
    if ranks.is_first:  # which alone shows samples of it
        averaged.to(device)
    trainers = [StageTrainer(model, index, training, ranks) for index in chosen]
    with folder.training(trainers) as changes:
        if ranks.is_first:
            _introduce(notes, data, source, folder.path, changes, progress)
        try:
            with StopSignal() as stop:
                for trainer in trainers:
                    StageLoop(
                        trainer, data, folder, initial, averaged, stop, skipped, validation, decode
                    ).run(progress)
        except Interrupted:
            skipped.report(ranks, held_out)
            raise
    skipped.report(ranks, held_out)
    metrics = folder.metrics()
    if ranks.is_first:
        plot_losses(metrics, folder.path / PLOT)
        folder.describe(metrics)
    # The saved one, because another process may have trained the other stages meanwhile.
    return (folder.saved_model() or averaged).to(device).requires_grad_(False)


def _data(config: MSFConfig, training: TrainingConfig, source: str) -> ImageData:
    return load_data(
        source,
        split="train",
        image_size=config.image_size,
        channels=config.channels,
        num_classes=config.num_classes,
        flip=training.flip,
        holdout=training.holdout,
    )


def _validation(data: ImageData, training: TrainingConfig) -> Validation | None:
    """Return what measures the loss on images that are held out, None where there are none. Those
    of the test split stay unseen until an evaluation."""
    if not training.holdout:
        return None
    try:
        return Validation(data.of_split("features"), training.seed)
    except ValueError:  # it has none
        return None


def _models(
    config: MSFConfig,
    seed: int,
    data: ImageData,
    folder: SharedFolder,
    skipped: Skipped,
    start: str,
    progress: bool,
) -> tuple[MSF, MSF]:
    """Return a new model with the statistics that the first process measured, and what is saved in
    ``folder``, which it alone reads, else a copy of the new one, which ``start`` may begin."""
    torch.default_generator.manual_seed(seed)  # the CPU's alone, which is forked
    saved = folder.saved_model()
    is_new = folder.ranks.first(lambda: saved is None)
    if start and is_new:
        model = folder.ranks.each(lambda: started_from(start, config, data.class_names))
    else:
        model = MSF(config)

    def fill() -> None:
        if saved:  # images added since must not change the statistics
            model.pyramid.load_state_dict(saved.pyramid.state_dict())
        if saved or not config.standardize:
            return
        batches = _statistics_batches(data, seed, skipped)
        count = -(-min(len(data), STATISTICS_IMAGES) // STATISTICS_BATCH)
        model.pyramid.measure(follow(batches, "statistics", count, "batches", shown=progress))

    folder.ranks.first(fill)
    folder.ranks.copy_first(model.pyramid.buffers())
    return model, saved or copy.deepcopy(model)


def _introduce(
    notes: Sequence[str],
    data: ImageData,
    source: str,
    path: Path,
    changes: Sequence[str],
    progress: bool,
) -> None:
    for note in notes:
        say(note)
    if progress:
        say(f"data: {printable(source)}: {data.summary()}")
    if changes:
        say(f"{printable(path)}: resuming with {', '.join(changes)}")


def _statistics_batches(data: ImageData, seed: int, skipped: Skipped) -> Iterator[Tensor]:
    readable = ReadableBatches(data)
    chosen = torch.randperm(len(data), generator=generator(seed))[:STATISTICS_IMAGES]
    for part, indices in enumerate(chosen.split(STATISTICS_BATCH)):
        # Latents are drawn here as in training: their posteriors' means deviate less.
        images, _, problems = readable.read(indices, (seed, *STATISTICS, part))
        skipped.add(problems)
        yield images


def _doubtful(
    training: TrainingConfig, steps: Mapping[str, int], images: int, processes: int
) -> list[str]:
    """Return what the user should know of the settings, ``steps`` being those of the stages to
    train. Raise ValueError where they make no sense with so many images and processes."""
    if training.parallel == "fsdp" and not torch.distributed.is_initialized():
        raise ValueError(
            'parallel "fsdp" needs torchrun, for one process too: torchrun --nproc-per-node 1 -m '
            "msf.cli train ..."
        )
    parts = processes * training.accumulation
    if training.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts}, {processes} processes times accumulation "
            f"{training.accumulation}, got {training.batch_size}"
        )
    if training.batch_size > MAX_EPOCHS_A_BATCH * images:
        raise ValueError(
            f"batch_size must be at most {MAX_EPOCHS_A_BATCH} times the {images:,} images for "
            f"training, got {training.batch_size}"
        )
    notes = []
    if training.batch_size > images:
        notes.append(
            f"batch_size {training.batch_size}: there are only {images:,} images, all of them are "
            "in each batch"
        )
    short = [name for name, count in steps.items() if count < training.warmup]
    if short:
        notes.append(
            f"{', '.join(short)}: training ends within the warm-up of {training.warmup} steps, "
            "below the full learning rate"
        )
    return notes
