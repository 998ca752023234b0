"""Rows as markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .results import Report, Row
from .roofline import Roofline

COLUMNS = ("shape", "dtype", "arm", "µs", "p10 to p90", "host µs", "rate", "%", "vs peer", "noise")
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def heading(report: Report) -> str:
    """The device, the versions and the rates that percentages are of."""
    facts = ", ".join(
        f"{name} {report.machine[name]}"
        for name in ("driver", "cuda", "torch", "triton", "commit")
        if report.machine[name]
    )
    rates, objection = report.roofline, report.objection()
    return (
        f"{report.machine['device']} ({facts}), {report.date}. 100 % is {rates.copy_gb_s:.4g} GB/s "
        f"read and written or {rates.matmul_tflop_s:.4g} TFLOP/s in bfloat16: {rates.how}."
        + (f" But {objection}." if objection else "")
    )


def markdown(rows: Iterable[Row], roofline: Roofline) -> str:
    """A table for each benchmark; the arms that were skipped are named below it."""
    lines = []
    for name, members in by_benchmark(rows).items():
        lines += [f"\n### {name}\n", line(COLUMNS), line(["---"] * len(COLUMNS))]
        lines += [line(_cells(row, roofline)) for row in members if row.status != "skipped"]
        skipped = {row.arm: row.note for row in members if row.status == "skipped"}
        lines += [f"\nNo {arm}: {reason}." for arm, reason in skipped.items()]
    return "\n".join(lines)


def by_benchmark(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Together what belongs together, small shapes first: a run measures in another order."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (math.prod(row.shape), row.shape, row.dtype)):
        groups.setdefault(row.benchmark, []).append(row)
    return dict(sorted(groups.items()))


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, roofline: Roofline) -> list[str]:
    cells = ["x".join(map(str, row.shape)), SHORT.get(row.dtype, row.dtype), row.arm]
    if row.median_us is None or row.p10_us is None or row.p90_us is None or row.percent is None:
        cells.append(f"{row.status}: {row.note}".replace("|", "\\|"))
    else:
        cells += [
            f"{row.median_us:.4g}",
            f"{row.p10_us:.4g} to {row.p90_us:.4g}",
            "" if row.host_us is None else f"{row.host_us:.3g}",
            _rate(row, row.median_us, roofline),
            f"{row.percent:.3g}",
            "" if row.peer_ratio is None else f"{row.peer_ratio:.2f}x",
            "" if row.noise is None else f"±{row.noise:.1f} %",
        ]
    return cells + [""] * (len(COLUMNS) - len(cells))


def _rate(row: Row, us: float, roofline: Roofline) -> str:
    """In the unit of what binds."""
    if roofline.matmul_us(row.flops) > roofline.memory_us(row.bytes):
        return f"{row.flops / us / 1e6:.4g} TFLOP/s"
    return f"{row.bytes / us / 1e3:.4g} GB/s"
