"""metrics.jsonl: a line for every point of a stage's losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import atomic_write, read_file
from ..parsing import parse_dataclass, parse_object
from ..progress import say


@dataclass(frozen=True)
class Metrics:
    """A Metrics is one line of metrics.jsonl; lines of earlier versions have no more than the
    first five. ``gradient_norm`` is averaged over about 100 steps; ``teraflops`` are those of the
    model's matrix products a second, and ``mfu`` is their part of what the GPUs could do.
    ``loss_by_time`` is the loss in each tenth of the times, from noise to data, None where there
    was none; ``validation_loss`` is that of ``Validation``, where one was made;
    ``memory_gib`` is the most that the first process's GPU had allocated."""

    stage: str
    step: int
    loss: float
    learning_rate: float
    images_per_second: float
    gradient_norm: float = 0.0
    teraflops: float = 0.0
    skipped_steps: int = 0
    mfu: float = 0.0
    loss_by_time: tuple[float | None, ...] = ()
    validation_loss: float = 0.0
    memory_gib: float = 0.0


def read(file: Path, stages: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Return every whole line of one of ``stages``, and how many others there are: the last one's
    writing may have been cut, and a disk may have damaged any."""
    lines = read_file(file).splitlines(keepends=True) if file.exists() else []
    rows: list[dict[str, Any]] = []
    for line in lines:
        with suppress(ValueError):
            row = parse_object(line, file)
            parse_dataclass(Metrics, row, "a line")
            if line.endswith(b"\n") and row["stage"] in stages:
                rows.append(row)
    return rows, len(lines) - len(rows)


def forget(file: Path, stages: Sequence[str], stage: str, after: int) -> None:
    """Drop what a killed run logged of ``stage`` beyond step ``after``, and lines that are damaged
    or of none of ``stages``, which is said."""
    if not file.exists():
        return
    rows, damaged = read(file, stages)
    kept = [row for row in rows if row["stage"] != stage or row["step"] <= after]
    if damaged:
        count = f"{damaged:,} of its {len(rows) + damaged:,} lines"
        say(f"{file}: dropped {count}, damaged or cut short")
    with atomic_write(file) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
