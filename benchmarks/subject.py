"""What is compared, whatever it is: an operator's call, a block, a training step, sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .arms import Arm
from .gate import Expected, Tolerance
from .results import Case, Row
from .timing import Work

# In order of value: what most of a model's time between its matrix products goes to comes first,
# then what a change of a kernel shows in first, and soonest.
OPERATORS: tuple[str, ...] = (
    "adaln",
    "attention",
    "qk_norm_rope",
    "interpolation",
    "euler",
    "pyramid",
    "tokens",
)
MODELS = ("block", "block and backward", "training step", "sampling")
FAMILIES = (*OPERATORS, *MODELS)


class Subject(Protocol):
    """One call on drawn numbers that every arm makes.

    Attributes:
        row: what its rows say of it, whatever the arm.
        whole: whether it is timed as a user waits for it, with what the host takes to launch it.
            The others are timed in a CUDA graph, without launch gaps and with cold caches.
    """

    whole: bool

    @property
    def row(self) -> Row: ...

    def expected(self) -> list[Expected]:
        """Return the right results, in float64 or float32."""
        ...

    def tolerance(self, arm: Arm) -> Tolerance:
        """Return how far off an arm may be."""
        ...

    def results(self, arm: Arm) -> tuple[Tensor | None, ...]:
        """Make one call and return all that it gives, in the order of `expected`."""
        ...

    def work(self, arm: Arm) -> Work:
        """Prepare what is timed."""
        ...


@dataclass(frozen=True)
class Target:
    """A subject that can be drawn when its turn comes: all together need more memory than there is.

    Args:
        op: an operator, or "block", "block and backward", "training step", "sampling".
        family: of the operator, or the op again.
        benchmark, shape, dtype: the case of its rows.
        place: of the shape among those of its benchmark, of which the first counts most.
        arms: all that can be compared on it.
        fingerprint: arm -> the hash of our code behind it, None for a peer.
        draw: makes the subject.
        seconds: the least time that an arm takes on a GPU, until one of this benchmark was timed.
    """

    op: str
    family: str
    benchmark: str
    shape: tuple[int, ...]
    dtype: str
    place: int
    arms: tuple[Arm, ...]
    fingerprint: Callable[[Arm], str | None]
    draw: Callable[[], Subject]
    seconds: float = 0.0

    @property
    def case(self) -> Case:
        return self.benchmark, self.shape, self.dtype

    @property
    def value(self) -> tuple[bool, int, int]:
        """A sort key: of two that both need a measurement the smaller comes first.

        bfloat16, in which models run, then each benchmark's first shape before the second of any.
        """
        return self.dtype != "bfloat16", self.place, FAMILIES.index(self.family)
