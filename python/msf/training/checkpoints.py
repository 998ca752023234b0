"""The states of one stage in a run's folder: the newest, and earlier ones with their steps."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from ..progress import say
from .config import CHECKPOINTS
from .state import check_step, read_state, step_of


class Checkpoints:
    """A Checkpoints finds, keeps and drops the states of ``stage`` in the run ``folder``."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.newest = folder / f"state-{stage}.safetensors"
        self._earlier, self._stage = folder / CHECKPOINTS, stage
        self._told: Path | None = None  # the last that was said to be in the newest's place

    def files(self) -> list[Path]:
        """Return those that are there, the newest first."""
        # By their nine digits, as a user may keep copies beside them.
        names = f"{self._stage}-{'[0-9]' * 9}.safetensors"
        earlier = sorted(self._earlier.glob(names), reverse=True)
        return [self.newest, *earlier] if self.newest.exists() else earlier

    def newest_whole(self) -> Path | None:
        """Return the newest that is whole; a newer one that is not is put aside. It is said, once,
        where an earlier one takes the newest's place. Where none is whole, return the last, and
        where there is none, None."""
        files = self.files()
        if files and files[0] not in (self.newest, self._told):
            self._tell(f"{self.newest}: is missing", files[0])
        for file, earlier in itertools.pairwise(files):
            try:
                read_state(file)
            except ValueError as error:
                os.replace(file, file.with_name(f"{file.name}.damaged"))
                self._tell(f"{error}; put aside as {file.name}.damaged", earlier)
            else:
                return file
        return files[-1] if files else None

    def _tell(self, why: str, file: Path) -> None:
        say(f"{why}; continuing from {file}")
        self._told = file

    def check_total(self, total: int) -> None:
        """Raise ValueError where the newest has taken more than ``total`` steps."""
        if not (files := self.files()):
            return
        try:
            if step_of(files[0]) <= total:
                return
            _, taken = read_state(files[0])
        except ValueError:  # damaged, which the training of its own stage mends or tells
            return
        check_step(files[0], taken, total)

    def retire(self) -> None:
        """Let the newest become an earlier one, before another is written."""
        if self.newest.exists():
            self._earlier.mkdir(exist_ok=True)
            os.replace(
                self.newest, self._earlier / f"{self._stage}-{step_of(self.newest):09d}.safetensors"
            )

    def prune(self, keep_last: int, keep_every: int) -> None:
        """Drop all but the newest ``keep_last`` and those of every ``keep_every`` steps (0: no
        others)."""
        for file in self.files()[keep_last:]:
            step = int(file.stem.rpartition("-")[2])
            if not keep_every or step % keep_every:
                file.unlink()
