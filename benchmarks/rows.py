"""What `benchmarks.model` found out about one way to run a model, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from .markdown import line
from .roofline import Roofline
from .timing import Timing

HEADINGS = ("way", "ms", "p10 to p90", "images/s", "%", "kernels", "MiB", "error")


@dataclass(frozen=True)
class Row:
    """One way at one size.

    Args:
        what: "block", "block and backward", "sampling" or "training step".
        model: a preset, or the width of a block.
        size: tokens of a block's image, or the batch of sampling or training.
        images, flops, steps: of one call; a block is one step, and so is training.
        status: "ok", "incorrect" or "failed", and `note` says why not ok. Only what is ok has
            times.
        error: relative L2 of the worst result; None if not finite.
        ms, p10_ms, p90_ms: of a call.
        percent: of this run's matrix product rate.
        kernels: that a step runs; None on a CPU.
        peak_mib: memory that a call needs beside weights and inputs; None on a CPU.
        fingerprint: of the code that was measured, where the way is ours.
    """

    what: str
    model: str
    size: int
    images: int
    flops: int
    steps: int = 1
    way: str = ""
    status: str = "ok"
    note: str | None = None
    error: float | None = None
    ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    images_s: float | None = None
    percent: float | None = None
    kernels: float | None = None
    peak_mib: float | None = None
    fingerprint: str | None = None
    noise: ClassVar[None] = None  # unlike operators, no way is timed twice

    @property
    def case(self) -> tuple[str, str, int]:
        return self.what, self.model, self.size

    @property
    def name(self) -> str:
        return self.way

    @property
    def label(self) -> str:
        return f"{self.what}, {self.model}, {self.size}, {self.way}"

    @property
    def us(self) -> float | None:
        return None if self.ms is None else 1e3 * self.ms

    def failed(self, error: Exception) -> Row:
        lines = str(error).strip().splitlines() or ["no message"]
        return replace(self, status="failed", note=f"{type(error).__name__}: {lines[0]}")

    def timed(self, timing: Timing, roofline: Roofline) -> Row:
        return replace(
            self,
            ms=timing.median_us / 1e3,
            p10_ms=timing.p10_us / 1e3,
            p90_ms=timing.p90_us / 1e3,
            images_s=1e6 * self.images / timing.median_us,
            percent=100 * roofline.matmul_us(self.flops) / timing.median_us,
        )


def table(rows: Sequence[Row]) -> str:
    """Markdown of the ways at one size."""
    first = rows[0]
    size = f"batch {first.images}"
    if first.what.startswith("block"):
        size = f"{first.size} tokens, {size}"
    title = f"\n### {first.what}, {first.model}, {size}\n"
    return "\n".join(
        [title, line(HEADINGS), line(["---"] * len(HEADINGS)), *(line(_cells(row)) for row in rows)]
    )


def _cells(row: Row) -> list[str]:
    if row.ms is None:
        cells = [row.way, f"{row.status}: {row.note}".replace("|", "\\|")]
        return cells + [""] * (len(HEADINGS) - len(cells))
    return [
        row.way,
        f"{row.ms:.4g}",
        f"{row.p10_ms:.4g} to {row.p90_ms:.4g}",
        f"{row.images_s:.4g}",
        f"{row.percent:.3g}",
        "" if row.kernels is None else f"{row.kernels:.4g}",
        "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
        f"{row.error:.1e}",
    ]
