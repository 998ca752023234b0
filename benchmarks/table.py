"""Print a result of `benchmarks.run` as markdown tables, and plot it beside the file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

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
    plot(report, path.with_suffix(".png"))
    print(markdown(report.rows, report.roofline))
    return 0


if __name__ == "__main__":
    sys.exit(main())
