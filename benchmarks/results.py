"""One run as a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from msf.files import atomic_write
from msf.parsing import parse_object

from .roofline import Roofline


@dataclass(frozen=True)
class Row:
    """One arm at one shape and dtype.

    Args:
        bytes, flops: what a call must move and what its matrix products compute.
        status: "ok", "incorrect", "failed" or "skipped", and `note` says why not ok. Only what is
            ok has times.
        error, bound: relative L2, of the worst output or gradient.
        median_us, p10_us, p90_us: of one call on the device.
        host_us: how long one call keeps the host busy.
        percent: of this run's copy rate, or of its matrix product rate where that binds.
        peer_ratio: the best correct peer's median over this one's: more than 1 is faster.
        noise: how far apart, in percent, two timings of one same arm were in these rounds.
        sizes: those by which a backend of the operator is chosen, if by any.
    """

    op: str
    benchmark: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    flops: int
    arm: str = ""
    status: str = "ok"
    note: str | None = None
    error: float | None = None
    bound: float | None = None
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    host_us: float | None = None
    percent: float | None = None
    peer_ratio: float | None = None
    noise: float | None = None
    sizes: tuple[int, ...] = ()


RowType = TypeVar("RowType")


@dataclass(frozen=True)
class Report(Generic[RowType]):
    """A run: when, on what, with which seed, the device's rates in it, and the rows."""

    date: str
    machine: dict[str, Any]
    seed: int
    roofline: Roofline
    rows: list[RowType]


def save(report: Report, path: Path) -> None:
    document = json.dumps(asdict(report), indent=1, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(document)


def load(path: Path) -> Report[Row]:
    """OSError, or ValueError in one line, where the file holds no report."""
    document = parse_object(path.read_bytes(), path)
    try:
        rows = [
            Row(**{**row, "shape": tuple(row["shape"]), "sizes": tuple(row["sizes"])})
            for row in document["rows"]
        ]
        known = {field.name: document[field.name] for field in fields(Report)}
        return Report(**{**known, "roofline": Roofline(**document["roofline"]), "rows": rows})
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not a result of benchmarks.run") from None
