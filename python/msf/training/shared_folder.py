"""A run's folder as the processes of one job see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..model import MSF
from .folder import RunFolder
from .ranks import Ranks
from .stage import StageTrainer


class SharedFolder:
    """A SharedFolder is the ``RunFolder`` of all processes, opened with the same ``options``: the
    first does what is asked of it, and what it raises ends the others too.

    All processes call each method together.
    """

    def __init__(self, ranks: Ranks, path: Path, *options: Any, **named: Any) -> None:
        self.ranks, self.path = ranks, path
        # None but in the first process, where alone what is given to ``first`` runs.
        self._folder: RunFolder = ranks.first(
            lambda: RunFolder(path, *options, **named), shared=False
        )

    @contextmanager
    def training(self, trainers: Sequence[StageTrainer]) -> Iterator[list[str]]:
        """Let no other job train the stages of ``trainers`` and continue them. Yield which settings
        of the run have changed."""
        names = [trainer.name for trainer in trainers]
        with ExitStack() as claims:
            self.ranks.first(lambda: claims.enter_context(self._folder.claimed(names)))
            for trainer in trainers:
                if state := self._newest_state(trainer.name):
                    self.ranks.each(partial(trainer.load, state))
                    self.ranks.first(partial(self._check_statistics, state, trainer.model))
            self.ranks.first(lambda: self._folder.begin(trainers))
            yield self.ranks.first(lambda: self._folder.changes)

    def _newest_state(self, stage: str) -> Path | None:
        return self.ranks.first(lambda: self._folder.models.states[stage].newest_whole())

    def _check_statistics(self, state: Path, model: MSF) -> None:
        self._folder.models.check_statistics(state, model)

    def saved_model(self) -> MSF | None:
        """Return the model as last saved, None where nothing is yet, and in all processes but the
        first."""
        return self.ranks.first(lambda: self._folder.models.read(), shared=False)

    def save(self, trainer: StageTrainer, initial: MSF) -> None:
        """Keep what ``trainer``'s steps have changed; see ``RunFolder.save``."""
        trainer.check_finite()
        state = trainer.state()
        self.ranks.first(lambda: self._folder.save(trainer, state, initial))

    def roll_back(self, trainer: StageTrainer) -> bool:
        """Take ``trainer``'s weights back to its newest state; return whether there is one."""
        state = self._newest_state(trainer.name)
        if state:
            trainer.roll_back(state)
        return state is not None

    def log(self, **row: Any) -> None:
        """Add a line to metrics.jsonl."""
        self.ranks.first(lambda: self._folder.log(**row))

    def metrics(self) -> list[dict[str, Any]]:
        """Return every whole line of metrics.jsonl, in the first process."""
        return self.ranks.first(lambda: self._folder.metrics(), shared=False)

    def describe(self, metrics: Sequence[dict[str, Any]]) -> None:
        """Write the model card, in the first process, which alone calls this."""
        self._folder.describe(metrics)
