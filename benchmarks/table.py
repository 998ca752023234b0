"""A result of `benchmarks.run` or `benchmarks.model` as markdown tables.

One of operators becomes a plot beside the file too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from . import rows
from .markdown import heading, markdown
from .parser import Parser
from .plot import plot
from .store import load


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.table", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    path = parser.parse_args(argv).result
    try:
        report = load(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(heading(report))
    if report.kind == "models":
        for _, group in groupby(report.rows, key=lambda row: row.case):
            print(rows.table(list(group)))
    else:
        plot(report, path.with_suffix(".png"))
        print(markdown(report.rows, report.roofline))
    return 0


if __name__ == "__main__":
    sys.exit(main())
