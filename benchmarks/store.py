"""The files of results: one for each run, which no later run overwrites.

They are `results/<gpu>/<UTC date>-<time>.json`. All files of a GPU count: of each case and arm, the
newest row is valid.
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

from .results import Report, Row
from .roofline import Roofline

RESULTS = Path(__file__).parent / "results"


def folder_of(device: torch.device) -> Path:
    return RESULTS / slug(device)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def save(report: Report, folder: Path) -> Path:
    """Write the file of this run, over that of its earlier reports, and return the path."""
    path = folder / name_of(report)
    document = {**asdict(report), "objection": report.objection()}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def keep(reports: Iterable[Report], folder: Path | None) -> str | None:
    """Save a run to the folder, if any; `reports` has the report so far after each measurement.

    A crash keeps what was measured before it. Return the objection to the whole run, if there is
    one.
    """
    objection = None
    for report in reports:
        objection = report.objection()
        if folder:
            save(report, folder)
    return objection


def name_of(report: Report) -> str:
    return f"{_time(report):%Y-%m-%d-%H%M%S}.json"


def load(path: Path) -> Report:
    """Return the report in a file. Raise OSError, or ValueError in one line, if it holds none."""
    document = parse_object(path.read_bytes(), path)
    try:
        known = {field.name: document[field.name] for field in fields(Report)}
        read = [Row(**_with_tuples(row)) for row in known["rows"]]
        report = Report(**{**known, "roofline": Roofline(**known["roofline"]), "rows": read})
        _time(report)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not a result of benchmarks.run") from None
    return report


def history(folder: Path) -> list[Report]:
    """Return all runs in a GPU's folder, the oldest first.

    Raise ValueError in one line if a file holds no report, or the folder those of several devices.
    """
    reports = sorted(map(load, sorted(folder.glob("[0-9]*.json"))), key=_time)
    devices = sorted({str(report.machine.get("device")) for report in reports})
    if len(devices) > 1:
        raise ValueError(f"{folder}: want the results of one device, got {', '.join(devices)}")
    return reports


def newest(reports: Iterable[Report]) -> list[Row]:
    """Return for each case and arm the row of the last report that has one."""
    found = {(row.case, row.arm): row for report in reports for row in report.rows}
    return list(found.values())


def _time(report: Report) -> datetime:
    return datetime.fromisoformat(report.date).astimezone(timezone.utc)


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
