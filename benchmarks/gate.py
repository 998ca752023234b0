"""The check that every arm, also a peer, must pass before it is timed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Errors may exceed what the counted roundings explain by this factor: the residual of a base that
# is already rounded, as in pyramid_split, errs by 1.1 roundings. No arm rounds more often than its
# tolerance counts.
SLACK = 1.25
WALK = 4  # a sum of n rounded terms errs by about sqrt(n) eps; 4 is for unlucky draws


@dataclass(frozen=True)
class Expected:
    """An Expected is one right result, and the dtype that an arm must return it in."""

    name: str
    exact: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Tolerance:
    """A Tolerance says how far an arm may be off.

    Args:
        roundings: how often results are rounded to their dtype on the way. This bounds their
            relative L2 error and the error of each element.
        terms: how many numbers the longest sum in float32 adds up.
        error: the relative L2 error that is allowed, where roundings cannot be counted.
    """

    roundings: int = 0
    terms: int = 0
    error: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A Verdict has the relative L2 error of the worst result, and its bound.

    `wrong` says what is wrong, if anything. `error` is None where results cannot be compared.
    """

    error: float | None
    bound: float | None
    wrong: str | None = None


def check(
    got: Sequence[Tensor | None], expected: Sequence[Expected], tolerance: Tolerance
) -> Verdict:
    """Check all that an arm returned against what is expected, within SLACK times the tolerance.

    No element may be off by more than the last bits of the largest one, so that a single missing
    row shows among a million.
    """
    if len(got) != len(expected):
        return Verdict(None, None, f"{len(got)} results, not {len(expected)}")
    verdicts = [_compare(tensor, right, tolerance) for tensor, right in zip(got, expected)]
    return max(verdicts, key=lambda verdict: (verdict.wrong is not None, _share(verdict)))


@contextmanager
def poison(expected: Sequence[Expected]) -> Iterator[None]:
    """Fill the memory that an arm allocates for its results with NaN, over any older results."""
    if expected[0].exact.device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
        return
    # On a GPU that would choose other algorithms than those that are timed. There the caching
    # allocator hands out freed blocks of the same sizes. An arm may take one for a temporary first.
    torch.cuda.empty_cache()
    blocks = [
        torch.full_like(right.exact, math.nan, dtype=right.dtype) for right in 2 * list(expected)
    ]
    del blocks
    yield


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return the relative L2 error, in float64."""
    exact = exact.to(got.device).double()
    return ((got.double() - exact).norm() / exact.norm()).item()


def _compare(got: Tensor | None, expected: Expected, tolerance: Tolerance) -> Verdict:
    name, exact, dtype = expected.name, expected.exact, expected.dtype
    if got is None:
        return Verdict(None, None, f"{name} is missing")
    if got.shape != exact.shape or got.dtype != dtype:
        right = f"{tuple(exact.shape)} {dtype}"
        return Verdict(None, None, f"{name} is {tuple(got.shape)} {got.dtype}, not {right}")
    if not got.isfinite().all():
        return Verdict(None, None, f"{name} holds NaN or infinity")
    error = relative_error(got, exact)
    if tolerance.error is not None:
        bound = SLACK * tolerance.error
        return Verdict(error, bound, _too_much(name, error, bound))
    arithmetic = WALK * math.sqrt(tolerance.terms) * torch.finfo(torch.float32).eps
    rounding = math.sqrt(tolerance.roundings) * relative_error(exact.to(dtype), exact)
    bound = SLACK * rounding + arithmetic
    worst = ((got.double() - exact).abs().max() / exact.abs().max()).item()
    if worst > tolerance.roundings * torch.finfo(dtype).eps + arithmetic and error <= bound:
        return Verdict(error, bound, f"one element of {name} is off by {worst:.1e} of the largest")
    return Verdict(error, bound, _too_much(name, error, bound))


def _too_much(name: str, error: float, bound: float) -> str | None:
    return f"{name} errs by {error:.1e}, more than {bound:.1e}" if not error <= bound else None


def _share(verdict: Verdict) -> float:
    """Return how much of its bound the error takes."""
    return math.inf if not verdict.bound else (verdict.error or 0.0) / verdict.bound
