"""The report of one run: its machine, and a row for each arm of each case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .roofline import Roofline

MAX_PERCENT = 102.0  # of a ceiling, which is measured too; noise does not explain more

Case = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class Row:
    """A Row is the result of one arm of an operator or a model, at one shape and dtype.

    Args:
        op: an operator, or "block", "block and backward", "training step", "sampling".
        benchmark: the op's name, to which it may add a variant, a direction or a model.
        shape: the shape of the tensor that the call is about.
        bytes, flops: what a call must move and what its matrix products compute; 0 bytes for
            models.
        status: "ok", "incorrect", "failed" or "skipped"; `note` says why a row is not ok. Only rows
            that are ok have times.
        error, bound: the relative L2 error of the worst output or gradient, and its bound.
        median_us, p10_us, p90_us: the time of one call.
        host_us: how long one call keeps the host; None on a CPU, and where the times include it.
        percent: the share of this run's copy rate, or of its matrix product rate where that binds.
        peer_ratio: the best correct peer's median over this one's; above 1 this arm is faster.
        noise: by how many percent two timings of the same arm differed in these rounds.
        sizes: the sizes on which the choice of a backend depends, if it does.
        fingerprint: the hash of the code that was measured, where it is ours.
        images, steps: what one call of a model makes and takes; 0 images for an operator.
        kernels: how many kernels a step of a model runs; None on a CPU.
        peak_mib: memory that a model's call needs beside weights and inputs; None on a CPU.
    """

    op: str
    benchmark: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    flops: int
    arm: str = ""
    status: str = "ok"
    note: str | None = None
    error: float | None = None
    bound: float | None = None
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    host_us: float | None = None
    percent: float | None = None
    peer_ratio: float | None = None
    noise: float | None = None
    sizes: tuple[int, ...] = ()
    fingerprint: str | None = None
    images: int = 0
    steps: int = 1
    kernels: float | None = None
    peak_mib: float | None = None

    @property
    def case(self) -> Case:
        """Return the case, whose arms are measured together and compared."""
        return self.benchmark, self.shape, self.dtype

    @property
    def label(self) -> str:
        return f"{self.benchmark} {'x'.join(map(str, self.shape))} {self.dtype} {self.arm}"


@dataclass(frozen=True)
class Report:
    """A Report is one run: date (ISO 8601, UTC), machine, seed, the device's rates, and rows."""

    date: str
    machine: dict[str, Any]
    seed: int
    roofline: Roofline
    rows: list[Row]

    @property
    def on_gpu(self) -> bool:
        return "capability" in self.machine

    def objection(self) -> str | None:
        """Return one line if a row passed the ceiling, None if none did.

        The ceiling is then wrong, and so is every percentage. A CPU gets no objection, because its
        small tensors stay in the caches.
        """
        return wrong_ceiling(self.rows) if self.on_gpu else None


def wrong_ceiling(rows: Sequence[Row]) -> str | None:
    """Return one line that names the row farthest above its ceiling, None if none is above."""
    percent, label = max(((row.percent or 0.0, row.label) for row in rows), default=(0.0, ""))
    if percent <= MAX_PERCENT:
        return None
    return f"the ceiling is wrong: {label} reached {percent:.0f} % of it"
