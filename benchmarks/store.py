"""Results as files: one run is one file, which no later run writes over.

They are `results/<gpu>/<UTC date>-<time>-<kind>.json`: kind "ops" of `benchmarks.run`, "models" of
`benchmarks.model`. What is known of a GPU is in all its files: of each row the newest holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from msf.files import atomic_write
from msf.parsing import parse_object
from msf_kernels.measurements import slug

from . import results, rows
from .results import Report
from .roofline import Roofline

RESULTS = Path(__file__).parent / "results"
ROWS: dict[str, Any] = {"ops": results.Row, "models": rows.Row}


def folder_of(device: torch.device) -> Path:
    return RESULTS / slug(device)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def save(report: Report, folder: Path) -> Path:
    """Write the file of this run; one that is still going on writes it anew."""
    path = folder / name_of(report)
    document = {**asdict(report), "objection": report.objection()}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def keep(reports: Iterable[Report], folder: Path | None) -> str | None:
    """Write a run, which comes as the report so far after each measurement, to the folder if any.

    A crash keeps what was measured before it. Returns the objection to the whole run, if there is
    one.
    """
    objection = None
    for report in reports:
        objection = report.objection()
        if folder:
            save(report, folder)
    return objection


def name_of(report: Report) -> str:
    return f"{_time(report):%Y-%m-%d-%H%M%S}-{report.kind}.json"


def load(path: Path) -> Report:
    """OSError, or ValueError in one line, where the file holds no report."""
    document = parse_object(path.read_bytes(), path)
    try:
        known = {field.name: document[field.name] for field in fields(Report)}
        read = [ROWS[known["kind"]](**_with_tuples(row)) for row in known["rows"]]
        report: Report = Report(
            **{**known, "roofline": Roofline(**known["roofline"]), "rows": read}
        )
        _time(report)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not a result of benchmarks.run or benchmarks.model") from None
    return report


def history(folder: Path, kind: str) -> list[Report]:
    """All runs of this kind in a GPU's folder, the oldest first.

    ValueError in one line where a file holds no report, or the folder those of several devices.
    """
    reports = sorted(map(load, sorted(folder.glob(f"*-{kind}.json"))), key=_time)
    devices = sorted({str(report.machine.get("device")) for report in reports})
    if len(devices) > 1:
        raise ValueError(f"{folder}: want the results of one device, got {', '.join(devices)}")
    return reports


def newest(reports: Iterable[Report]) -> list[Any]:
    """Of each case and arm the row of the last report that has it."""
    found = {(row.case, row.name): row for report in reports for row in report.rows}
    return list(found.values())


def _time(report: Report) -> datetime:
    return datetime.fromisoformat(report.date).astimezone(timezone.utc)


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
