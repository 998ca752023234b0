"""One run: what it was made on, and a row for each arm of each case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .roofline import Roofline

MAX_PERCENT = 102.0  # of a ceiling, which is a measurement itself; more is no noise

Case = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class Row:
    """One arm of an operator or a model, at one shape and dtype.

    Args:
        op: an operator, or "block", "block and backward", "training step", "sampling".
        benchmark: what tells it from the op's others, such as a variant, direction or model.
        shape: of the tensor that the call is about.
        bytes, flops: what a call must move and what its matrix products compute; no bytes are
            counted of models.
        status: "ok", "incorrect", "failed" or "skipped", and `note` says why not ok. Only what is
            ok has times.
        error, bound: relative L2, of the worst output or gradient.
        median_us, p10_us, p90_us: of one call.
        host_us: how long one call keeps the host; None on a CPU, and where the times hold it.
        percent: of this run's copy rate, or of its matrix product rate where that binds.
        peer_ratio: the best correct peer's median over this one's: more than 1 is faster.
        noise: how far apart, in percent, two timings of one same arm were in these rounds.
        sizes: those by which a backend of the operator is chosen, if by any.
        fingerprint: of the code that was measured, where it is ours.
        images, steps: of one call of a model; 0 images of an operator.
        kernels: that a step of a model runs; None on a CPU.
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
        """What is measured together, and compared: all but the arm."""
        return self.benchmark, self.shape, self.dtype

    @property
    def label(self) -> str:
        return f"{self.benchmark} {'x'.join(map(str, self.shape))} {self.dtype} {self.arm}"


@dataclass(frozen=True)
class Report:
    """A run: when (ISO 8601, UTC), on what, with which seed, the device's rates in it, the rows."""

    date: str
    machine: dict[str, Any]
    seed: int
    roofline: Roofline
    rows: list[Row]

    @property
    def on_gpu(self) -> bool:
        return "capability" in self.machine

    def objection(self) -> str | None:
        """One line where a row passed the ceiling, which is then wrong, and so is every percentage.

        On a CPU none is claimed: its small tensors stay in the caches.
        """
        return wrong_ceiling(self.rows) if self.on_gpu else None


def wrong_ceiling(rows: Sequence[Row]) -> str | None:
    """One line that names the row that is farthest above its ceiling, if any is."""
    percent, label = max(((row.percent or 0.0, row.label) for row in rows), default=(0.0, ""))
    if percent <= MAX_PERCENT:
        return None
    return f"the ceiling is wrong: {label} reached {percent:.0f} % of it"
