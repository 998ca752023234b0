"""Compare the newest results of a GPU with its earlier ones, in a markdown table.

    python -m benchmarks.changes                           this machine's GPU
    python -m benchmarks.changes benchmarks/results/h200

Each row of the newest run is compared with the newest earlier row that has a time. Below the table
stand the rows that got slower by more than the noise, or are no longer right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .markdown import duration, line
from .parser import Parser
from .results import Report, Row
from .store import folder_of, history, newest

# An arm's times may differ by this many percent between two runs, which the A/A pairs within one
# run cannot show. It is an assumption: no GPU has made the same run twice yet.
LEAST_NOISE = 2.0


@dataclass(frozen=True)
class Change:
    """A Change is a row that was timed before, and now is timed again, incorrect or failed."""

    before: Row
    now: Row

    @property
    def ratio(self) -> float | None:
        """Return the time now over the time before; None unless both were timed."""
        before, now = self.before.median_us, self.now.median_us
        return now / before if now and before else None

    @property
    def worse(self) -> str | None:
        """Return how the row got worse: slower than noise explains, or not right. Else None."""
        noise = max(LEAST_NOISE, sum(row.noise or 0.0 for row in (self.before, self.now)))
        if self.ratio is None:
            return self.now.status
        slower = 100 * (self.ratio - 1)
        return f"{slower:.1f} % slower, noise {noise:.1f} %" if slower > noise else None

    def cells(self) -> list[str]:
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        return [self.now.label, _time(self.before), _time(self.now), ratio]


def changes(reports: Sequence[Report]) -> Iterator[Change]:
    """Yield each row of the last report beside the newest earlier row that has a time."""
    *older, last = reports
    before = {(row.case, row.arm): row for row in newest(_timed(report) for report in older)}
    for row in last.rows:
        old = before.get((row.case, row.arm))
        if old and row.status != "skipped":
            yield Change(old, row)


def _timed(report: Report) -> Report:
    return replace(report, rows=[row for row in report.rows if row.median_us])


def _time(row: Row) -> str:
    return row.status if row.median_us is None else duration(row.median_us)


def text(found: Sequence[Change]) -> str:
    lines = [line(("row", "before", "now", "now/before")), line(["---"] * 4)]
    lines += [line(change.cells()) for change in found]
    worse = [f"- {change.now.label}: {change.worse}" for change in found if change.worse]
    return "\n".join([*lines, "", "Got worse:" if worse else "Nothing got worse.", "", *worse])


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.changes", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    named = parser.parse_args(argv).folder
    folder = named or folder_of(device)
    if named and not named.is_dir():
        parser.error(f"{named}: no such folder of results")
    try:
        reports = history(folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    found = list(changes(reports)) if reports else []
    print(f"Now: {reports[-1].date if reports else 'nothing'}.\n")
    print(text(found) if found else f"{folder}: no row was measured before and again, to compare.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
