"""metrics.jsonl: a line for every point of a stage's losses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import atomic_write, read_file
from ..parsing import parse_dataclass, parse_object
from .skipped import say


@dataclass(frozen=True)
class Metrics:
    """A Metrics is one line of metrics.jsonl."""

    stage: str
    step: int
    loss: float
    learning_rate: float
    images_per_second: float


def read(file: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return every whole line, and whether a torn one follows: the writing of a last line that
    does not end, or that is no JSON below others that are, was cut. Raise ValueError (one line) for
    whatever else is wrong."""
    lines = read_file(file).splitlines(keepends=True) if file.exists() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        last = number == len(lines)
        if last and (not line.endswith(b"\n") or (rows and not _is_json(line))):
            return rows, True
        where = f"{file}: line {number}"
        rows.append(vars(parse_dataclass(Metrics, parse_object(line, where), where)))
    return rows, False


def forget(file: Path, stage: str, after: int) -> None:
    """Drop what a killed run logged of ``stage`` beyond step ``after``, and say if a torn line
    goes."""
    if not file.exists():
        return
    rows, torn = read(file)
    kept = [row for row in rows if row["stage"] != stage or row["step"] <= after]
    if torn:
        say(f"{file}: dropped its last line, whose writing was cut short")
    with atomic_write(file) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):  # bytes that are no UTF-8 too
        return False
    return True
