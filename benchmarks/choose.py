"""From a result of `benchmarks.run`, the order in which our backends are chosen on that GPU.

    python -m benchmarks.choose benchmarks/results/h200/all.json

writes msf_kernels/measured/h200.json, named after the result's folder. An operator's backends are
ordered by the geometric mean of their times over the shapes, dtypes and directions that all of them
ran correctly.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from msf.files import atomic_write
from msf_kernels.backend import BACKENDS
from msf_kernels.measured import FOLDER

from .parser import Parser
from .results import Row, load


def orders(rows: Iterable[Row]) -> dict[str, list[str]]:
    """{operator: its backends, fastest first}."""
    times: dict[str, dict[str, dict[object, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.arm in BACKENDS and row.median_us:
            times[row.op][row.arm][(row.benchmark, row.shape, row.dtype)] = row.median_us
    return {op: _fastest_first(arms) for op, arms in times.items()}


def _fastest_first(arms: dict[str, dict[object, float]]) -> list[str]:
    common = set.intersection(*(set(runs) for runs in arms.values()))

    def cost(arm: str) -> float:
        return sum(math.log(arms[arm][run]) for run in common)

    return sorted(arms, key=cost)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.choose", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    path = parser.parse_args(argv).result
    try:
        table = orders(load(path).rows)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not table:
        parser.error(f"{path}: no time of a backend of ours in it")
    FOLDER.mkdir(exist_ok=True)
    with atomic_write(FOLDER / f"{path.resolve().parent.name}.json") as temporary:
        temporary.write_text(json.dumps(table, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
