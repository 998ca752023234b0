"""What arms are compared on: an operator's call, a block, a training step or sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .arms import Arm
from .gate import Expected, Tolerance
from .results import Case, Row
from .timing import Work

# In order of value. Of the operators, those come first that take most of a model's time between its
# matrix products; of the models, those that show a change of a kernel first and soonest.
OPERATORS: tuple[str, ...] = (
    "adaln",
    "attention",
    "qk_norm_rope",
    "bias_gelu",
    "interpolation",
    "euler",
    "pyramid",
    "tokens",
)
MODELS = ("block", "block and backward", "training step", "sampling")
FAMILIES = (*OPERATORS, *MODELS)


class Subject(Protocol):
    """A Subject is one call on drawn numbers that every arm makes.

    Attributes:
        row: what the rows of all its arms have in common.
        whole: whether it is timed as a user waits for it, with what the host takes to launch it.
            Other subjects are timed in a CUDA graph, without launch gaps and with cold caches.
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
        """Return the work that is timed."""
        ...


@dataclass(frozen=True)
class Target:
    """A Target draws its subject when its turn comes: all subjects together do not fit in memory.

    Args:
        op: an operator, or "block", "block and backward", "training step", "sampling".
        family: the operator's family, or the op again.
        benchmark, shape, dtype: the case of its rows.
        place: the shape's place among those of its benchmark, of which the first counts most.
        arms: all arms that can be compared on it.
        fingerprint: arm -> the hash of our code behind it, None for a peer.
        draw: makes the subject.
        seconds: the least that an arm takes on a GPU, assumed until this benchmark was timed.
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
        """Return a sort key: of two targets that need a measurement, the smaller comes first.

        First comes bfloat16, in which models run, and the first shapes before the second ones.
        """
        return self.dtype != "bfloat16", self.place, FAMILIES.index(self.family)
