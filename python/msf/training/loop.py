"""The loop over one stage's steps: checkpoints, sample grids, and what is kept when it ends
early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from ..data import ImageData
from ..images import component_grid, tile
from ..model import MSF
from ..progress import say
from ..sampling import sample_components
from .batches import batches
from .interrupts import Interrupted, StopSignal, uncut
from .recorder import Recorder
from .shared_folder import SharedFolder
from .skipped import ReadableBatches, Skipped
from .stage import NotFinite, StageTrainer
from .validation import Validation

Decode = Callable[[Tensor], Tensor]  # latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1]

PREVIEW_IMAGES = 25
PREVIEW_STEPS = 50
ROLLBACKS = 3  # in a row; what spoils the weights then is no accident


class StageLoop:
    """A StageLoop trains ``trainer`` to its last step and keeps it in ``folder``; ``initial`` has
    the weights of all stages as they were at first.

    Averaged weights go into the model ``averaged``, of whose samples ``decode`` makes images where
    they are latents, and ``validation`` measures their loss.
    """

    def __init__(
        self,
        trainer: StageTrainer,
        data: ImageData,
        folder: SharedFolder,
        initial: MSF,
        averaged: MSF,
        stop: StopSignal,
        skipped: Skipped,
        validation: Validation | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.trainer, self.data, self.folder = trainer, data, folder
        self._validate = partial(validation.loss, trainer) if validation else None
        self.initial, self.averaged = initial, averaged
        self.stop, self.skipped, self._decode = stop, skipped, decode
        self._rollbacks = 0
        self._saved = self._kept = trainer.step_number  # the latter also where it could not be
        self._ends_all = False  # whether what ends this process's loop ends all of the job's

    def run(self, progress: bool) -> None:
        """Raise Interrupted when stopped. Whatever else ends the loop, its last whole step is saved
        before that is raised."""
        with Recorder(self.trainer, self.folder, progress) as recorder:
            try:
                self._steps(recorder)
            except KeyboardInterrupt:
                self._keep_after(None, recorder)
                raise self._interrupted() from None
            except Exception as error:
                self._keep_after(error, recorder)
                raise

    def _steps(self, recorder: Recorder) -> None:
        trainer, config = self.trainer, self.trainer.config
        has_labels = trainer.model.config.num_classes > 0
        if trainer.step_number == trainer.total_steps and trainer.window.steps:
            recorder.flush()  # it was stopped at what is now its last step
            self._keep(recorder)
        for images, labels in self._shared(self._batches()):
            trainer.step(images, labels if has_labels else None)
            step = trainer.step_number
            stopped = trainer.ranks.any(self.stop.received)
            is_last = step == trainer.total_steps
            ends = stopped or is_last
            # What stops the job may end it in seconds, so it adds no grid of its own.
            samples = is_last or step % config.sample_every == 0
            keeps = is_last or step % config.checkpoint_interval == 0
            taken = True
            recorder.add(len(images))
            try:
                if recorder.is_due:
                    taken = recorder.flush(self._validate if samples else None)
            except NotFinite as error:
                self._roll_back(error, ends)
                recorder.start_clock()
                continue
            if ends or (keeps and taken):
                self._keep(recorder)
            if samples:
                self._picture(recorder)
            if keeps or samples:
                recorder.start_clock()  # the time of either is not that of training
            if stopped:
                raise self._interrupted()
            if keeps:
                self.skipped.check_all(trainer.ranks)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what this process takes of each step's batch, all its parts in one, on its
        device."""
        trainer, config = self.trainer, self.trainer.config
        count = config.accumulation
        first = trainer.ranks.rank * count
        parts = batches(
            self.data,
            config.batch_size,
            trainer.step_number,
            trainer.total_steps,
            config.seed,
            slices=trainer.ranks.count * count,
            own=range(first, first + count),
            skipped=self.skipped,
            pin=trainer.device.type == "cuda",
        )
        while own := list(islice(parts, count)):
            # On the CPU the whole would not be in page-locked memory any more.
            images, labels = (
                torch.cat([x.to(trainer.device, non_blocking=True) for x in part])
                for part in zip(*own)
            )
            yield images, labels

    def _shared(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``batches``. What reading one raises in any process ends the loops of all, after
        the same step."""
        while True:
            try:
                batch = self.trainer.ranks.each(lambda: next(batches, None))
            except BaseException:
                self._ends_all = True
                raise
            if batch is None:
                return
            yield batch

    def _keep(self, recorder: Recorder) -> None:
        self._kept = self.trainer.step_number
        with uncut():
            recorder.check()
            self.folder.save(self.trainer, self.initial)
        self._saved, self._rollbacks = self._kept, 0

    def _picture(self, recorder: Recorder) -> None:
        """Keep a sample grid, unless samples are latents that nothing decodes."""
        trainer = self.trainer
        if self._decode or self.averaged.config.channels in (1, 3):
            trainer.copy_average(self.averaged.stages[trainer.index])
            if trainer.ranks.is_first:
                recorder.picture(preview(self.averaged, trainer.index, self.data, self._decode))

    def _roll_back(self, error: NotFinite, ends: bool) -> None:
        """Return to the weights of the newest checkpoint. Raise ``error`` where training ``ends``,
        or there is no checkpoint, or none that was made since the third time."""
        trainer, self._rollbacks = self.trainer, self._rollbacks + 1
        if ends or self._rollbacks > ROLLBACKS or not self.folder.roll_back(trainer):
            raise error
        if trainer.ranks.is_first:
            say(
                f"{trainer.name}: no step before step {trainer.step_number} could be taken; going "
                f"on with the weights of step {self._saved}"
            )

    def _keep_after(self, error: Exception | None, recorder: Recorder) -> None:
        """Save the steps since the last checkpoint, unless a step was cut or they are what is
        wrong. What else is wrong then must not hide ``error``."""
        trainer = self.trainer
        if trainer.is_torn or isinstance(error, NotFinite) or trainer.step_number == self._kept:
            return
        if trainer.ranks.count > 1 and not self._ends_all:  # the others may be elsewhere, or gone
            return
        try:
            if recorder.is_due:
                with uncut():
                    recorder.flush()
            self._keep(recorder)
        except Exception as another:
            if trainer.ranks.is_first:
                say(f"{trainer.name}: could not save step {trainer.step_number}: {another}")
        else:
            if error and trainer.ranks.is_first:
                say(
                    f"{trainer.name}: an error, but step {trainer.step_number} is saved in "
                    f"{self.folder.path}; continue with --resume"
                )

    def _interrupted(self) -> Interrupted:
        trainer, kept = self.trainer, f"saved in {self.folder.path}"
        if self._saved != trainer.step_number:
            kept = f"step {self._saved} is {kept}" if self._saved else "nothing is saved"
        elif not self._saved:
            kept = "nothing to save yet"
        return Interrupted(
            f"stopped at step {trainer.step_number} of {trainer.total_steps} of {trainer.name}; "
            f"{kept}, continue with --resume"
        )


@torch.no_grad()
def preview(model: MSF, index: int, data: ImageData, decode: Decode | None = None) -> Tensor:
    """Return a grid (C, h, w) of samples of the stages up to ``index``, above true bases where the
    base is untrained: of latents those images that ``decode`` makes."""
    indices = torch.arange(PREVIEW_IMAGES) * len(data) // PREVIEW_IMAGES
    images, labels, _ = ReadableBatches(data)[indices]
    true_base = model.pyramid.split(images.to(model.pyramid.mean.device))[0]
    _, components = sample_components(
        model,
        model.trained_labels(labels),
        seeds=range(PREVIEW_IMAGES),
        steps=tuple(min(steps, PREVIEW_STEPS) for steps in model.config.steps),
        base=true_base if "base" in model.untrained_stages else None,
    )
    components = components[: index + 1]
    if decode:
        return tile(decode(model.pyramid.merge(components)))
    return component_grid(model, components)
