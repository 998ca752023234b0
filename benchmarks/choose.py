"""From a result of `benchmarks.run`, the order in which backends are chosen on that GPU.

    python -m benchmarks.choose benchmarks/results/h200/*.json

writes msf_kernels/measured/h200.json, named after the results' folder. The backends of an operator,
and those of its backward, are ordered by the geometric mean of their times over the shapes and
dtypes that all of them took, at each of the sizes where the choice depends on these. One that was
wrong or failed in any is left out.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from msf.files import atomic_write
from msf_kernels.measured import FOLDER, Sizes

from .arms import OURS
from .parser import Parser
from .results import Row, load

Costs = dict[tuple[Any, ...], float]  # of a benchmark, shape and dtype: the logarithm of its time


def orders(rows: Iterable[Row]) -> dict[str, Any]:
    """What `msf_kernels.measured` reads: operators with their backends, fastest first."""
    costs: dict[tuple[str, Sizes], dict[str, Costs]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.arm in OURS and row.status != "skipped":
            op = row.op + "_backward" * row.benchmark.endswith(" backward")
            cost = math.log(row.median_us) if row.median_us else math.inf
            costs[op, row.sizes][row.arm][row.benchmark, row.shape, row.dtype] = cost
    table: dict[str, Any] = {}
    for (op, sizes), arms in costs.items():
        if order := _fastest_first(arms):
            if sizes:
                table.setdefault(op, []).append({"sizes": sizes, "order": order})
            else:
                table[op] = order
    return table


def _fastest_first(arms: dict[str, Costs]) -> list[str]:
    """By the sum of the costs of what all took, of those that were always correct."""
    correct = {arm: costs for arm, costs in arms.items() if all(map(math.isfinite, costs.values()))}
    common = set.intersection(*(set(costs) for costs in correct.values())) if correct else set()
    totals = {arm: sum(costs[case] for case in common) for arm, costs in correct.items()}
    return sorted(totals, key=totals.__getitem__) if common else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.choose", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    paths = parser.parse_args(argv).results
    try:
        reports = [load(path) for path in paths]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path, report in zip(paths, reports):
        if "multiprocessors" not in report.machine:
            parser.error(f"{path}: measured on a CPU; only a GPU's result can be chosen from")
    table = orders(row for report in reports for row in report.rows)
    folders = {path.resolve().parent.name for path in paths}
    if len(folders) > 1:
        parser.error(f"results must be of one GPU's folder, got {', '.join(sorted(folders))}")
    if not table:
        parser.error(f"{paths[0]}: no time of a backend of ours in it")
    FOLDER.mkdir(exist_ok=True)
    with atomic_write(FOLDER / f"{folders.pop()}.json") as temporary:
        temporary.write_text(json.dumps(table, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
