"""A plot of each row's percentage of what the device reaches, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from msf.files import atomic_write

from .markdown import by_benchmark
from .results import Report, Row

WIDTH, PANEL_HEIGHT = 10.0, 2.4  # inches
BARS = 0.8  # of the distance between two groups
LEGEND = 5  # arms in a line


def plot(report: Report, path: Path) -> None:
    """Plot a panel a benchmark, with a group of bars a shape and dtype, and a bar an arm."""
    panels = list(by_benchmark(report.rows).values())
    figure = Figure((WIDTH, 0.8 + PANEL_HEIGHT * len(panels)), layout="constrained")
    arms = dict.fromkeys(row.arm for row in report.rows if row.percent is not None)
    colors = {arm: colormaps["tab20"](i) for i, arm in enumerate(arms)}
    for axis, rows in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        _panel(axis, rows, colors)
    patches = [Patch(color=color, label=arm) for arm, color in colors.items()]
    figure.legend(handles=patches, ncols=LEGEND, loc="outside upper right", frameon=False)
    figure.suptitle(report.machine["device"], x=0.01, ha="left")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _panel(axis: Axes, rows: list[Row], colors: Mapping[str, Any]) -> None:
    arms = list(dict.fromkeys(row.arm for row in rows if row.percent is not None))
    places = list(dict.fromkeys((row.shape, row.dtype) for row in rows))
    for row in rows:
        if row.percent is not None:
            width = BARS / len(arms)
            offset = width * (arms.index(row.arm) - (len(arms) - 1) / 2)
            place = places.index((row.shape, row.dtype)) + offset
            axis.bar(place, row.percent, width, color=colors[row.arm])
    labels = ["x".join(map(str, shape)) + f"\n{dtype}" for shape, dtype in places]
    axis.set_xticks(range(len(places)), labels, fontsize=6)
    axis.axhline(100, color="grey", linewidth=0.5)
    axis.set_title(rows[0].benchmark, fontsize=9, loc="left")
    axis.set_ylabel("% of copy or product", fontsize=8)
