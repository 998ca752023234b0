"""Rows as markdown tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from .results import Report, Row
from .roofline import Roofline

SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def heading(report: Report) -> str:
    """Return one line: the device, the versions, and the rates that percentages refer to."""
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
    """Return a table for each benchmark; the arms that were skipped are named below it."""
    lines = []
    for name, members in by_benchmark(rows).items():
        ran = [row for row in members if row.status != "skipped"]
        skipped = {row.arm: row.note for row in members if row.status == "skipped"}
        lines += [f"\n### {name}\n", *_table(ran, roofline)]
        lines += [f"\nNo {arm}: {reason}." for arm, reason in skipped.items()]
    return "\n".join(lines)


def by_benchmark(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group the rows by benchmark, small shapes first; a run measures in another order."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (math.prod(row.shape), row.shape, row.dtype)):
        groups.setdefault(row.benchmark, []).append(row)
    return dict(sorted(groups.items()))


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def duration(us: float) -> str:
    """Return microseconds in the unit that suits them."""
    if us < 1e3:
        return f"{us:.4g} µs"
    return f"{us / 1e3:.4g} ms" if us < 1e6 else f"{us / 1e6:.4g} s"


def _table(rows: Sequence[Row], roofline: Roofline) -> list[str]:
    """Return the lines of a table, without empty columns."""
    columns: dict[str, Callable[[Row], str | None]] = {
        "shape": lambda row: "x".join(map(str, row.shape)),
        "dtype": lambda row: SHORT.get(row.dtype, row.dtype),
        "arm": lambda row: row.arm,
        "time": lambda row: (
            f"{row.status}: {row.note}" if row.median_us is None else duration(row.median_us)
        ),
        "p10 to p90": lambda row: _range(row.p10_us, row.p90_us),
        "host µs": lambda row: _number(row.host_us, ".3g"),
        "rate": lambda row: _rate(row, row.median_us, roofline) if row.median_us else None,
        "%": lambda row: _number(row.percent, ".3g"),
        "vs peer": lambda row: _number(row.peer_ratio, ".2f", "x"),
        "noise": lambda row: None if row.noise is None else f"±{row.noise:.1f} %",
        "error": lambda row: _number(row.error, ".1e"),
        "kernels": lambda row: _number(row.kernels, ".4g"),
        "MiB": lambda row: _number(row.peak_mib, ".0f"),
    }
    cells = {
        name: [(text(row) or "").replace("|", "\\|") for row in rows]
        for name, text in columns.items()
    }
    shown = {name: column for name, column in cells.items() if any(column)}
    return [line(shown), line(["---"] * len(shown)), *map(line, zip(*shown.values()))]


def _number(value: float | None, digits: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{digits}}{unit}"


def _range(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{duration(low)} to {duration(high)}"


def _rate(row: Row, us: float, roofline: Roofline) -> str:
    """Return images/s of a model, and TFLOP/s or GB/s of an operator, whichever limits it."""
    if row.images:
        return f"{1e6 * row.images / us:.4g} images/s"
    if roofline.matmul_us(row.flops) > roofline.memory_us(row.bytes):
        return f"{row.flops / us / 1e6:.4g} TFLOP/s"
    return f"{row.bytes / us / 1e3:.4g} GB/s"
