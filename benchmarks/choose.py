"""Derive the order in which backends are chosen on a GPU from all of its results.

    python -m benchmarks.choose benchmarks/results/h200

writes msf_kernels/measured/h200.json, named after the folder. The newest row of a case and an arm
counts. The backends of an operator, and those of its backward, are ordered by the geometric mean of
their times over the shapes and dtypes that all of them ran. Where the choice depends on sizes, each
of them has its own order. A backend that was wrong or failed in any case is left out.
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
from msf_kernels import OPERATORS, backends_of
from msf_kernels.measurements import FOLDER, Sizes

from . import store
from .parser import Parser
from .results import Row
from .store import history, newest

Costs = dict[tuple[Any, ...], float]  # {(benchmark, shape, dtype): logarithm of the time}


def orders(rows: Iterable[Row]) -> dict[str, Any]:
    """Return what `msf_kernels.measurements` reads: each operator's backends, fastest first."""
    costs: dict[tuple[str, Sizes], dict[str, Costs]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.op in OPERATORS and row.arm in backends_of(row.op) and row.status != "skipped":
            op = row.op + "_backward" * row.benchmark.endswith(" backward")
            cost = math.log(row.median_us) if row.median_us else math.inf
            costs[op, row.sizes][row.arm][row.case] = cost
    table: dict[str, Any] = {}
    for (op, sizes), arms in costs.items():
        if order := _fastest_first(arms):
            if sizes:
                table.setdefault(op, []).append({"sizes": sizes, "order": order})
            else:
                table[op] = order
    return table


def _fastest_first(arms: dict[str, Costs]) -> list[str]:
    """Sort the arms that were always correct by their total cost over the cases that all ran."""
    correct = {arm: costs for arm, costs in arms.items() if all(map(math.isfinite, costs.values()))}
    common = set.intersection(*(set(costs) for costs in correct.values())) if correct else set()
    totals = {arm: sum(costs[case] for case in common) for arm, costs in correct.items()}
    return sorted(totals, key=totals.__getitem__) if common else []


def best(rows: Iterable[Row], orders: dict[str, Any]) -> dict[str, str]:
    """Say in words how fast the chosen backend of each operator was.

    The time is that of the first forward in bfloat16. A run begins with it, as it tells most.
    """
    found: dict[str, Row] = {}
    for row in rows:
        if row.op in orders and row.dtype == "bfloat16" and row.median_us:
            forward = not row.benchmark.endswith(" backward")
            if forward and row.arm == _first(orders[row.op], row.sizes):
                found.setdefault(row.op, row)
    return {op: _words(row) for op, row in found.items()}


def _first(order: list[Any], sizes: Sizes) -> str | None:
    """Return the backend that comes first at these sizes, None where none was measured."""
    if isinstance(order[0], str):
        return order[0]
    return next((entry["order"][0] for entry in order if tuple(entry["sizes"]) == sizes), None)


def _words(row: Row) -> str:
    ratio = f", {row.peer_ratio:.2f}x the best peer's speed" if row.peer_ratio else ""
    return f"{row.label} {row.median_us:.3g} us, {row.percent:.0f} % of the ceiling{ratio}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.choose", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    try:
        reports = [run for run in history(folder) if any(row.op in OPERATORS for row in run.rows)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not reports:
        parser.error(f"{folder}: no result of benchmarks.run in it")
    if not reports[-1].on_gpu:
        parser.error(f"{folder}: measured on a CPU; only a GPU's results can be chosen from")
    rows = newest(reports)
    table = orders(rows)
    if not table:
        parser.error(f"{folder}: no time of a backend of ours in it")
    capability = reports[-1].machine["capability"]
    document = {
        "capability": capability,
        "results": [store.name_of(report) for report in reports],
        "orders": table,
        "best": best(rows, table),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{folder.resolve().name}.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
