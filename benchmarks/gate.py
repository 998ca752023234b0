"""Correct before timed: every arm, peers too, against the reference in float64.

The reference is the operator on its reference backend, given the same numbers in float64: the
equations of `msf_kernels/<family>/reference.py`, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import msf_kernels

from .arms import Arm, results
from .registry import Benchmark, Case

SLACK = 1.25  # a residual of a base already rounded, as pyramid_split's, errs by 1.1 roundings
WALK = 4  # a sum of n rounded terms errs by about sqrt(n) eps; 4 is for unlucky draws


@dataclass(frozen=True)
class Expected:
    """An output or gradient in float64, and the dtype that an arm must return it in."""

    name: str
    exact: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Verdict:
    """The relative L2 error of the worst result beside its bound; `wrong` says what is, if any.

    Without an error the result cannot be compared at all.
    """

    error: float | None
    bound: float | None
    wrong: str | None = None


def expected_results(benchmark: Benchmark, case: Case) -> list[Expected]:
    """Outputs are of the dtype of the first argument, gradients of that of their own."""
    reference = Arm("reference", benchmark.ours, partial(msf_kernels.backend, "reference"))
    exact = [
        tensor for tensor in results(reference, benchmark, case.double()) if tensor is not None
    ]
    outputs = len(exact) - benchmark.gradients
    names = [f"output {i}" for i in range(outputs)]
    names += [f"gradient {i}" for i in range(benchmark.gradients)]
    like = [case.args[0]] * outputs + list(case.args[: benchmark.gradients])
    return [Expected(name, tensor, arg.dtype) for name, tensor, arg in zip(names, exact, like)]


def check(arm: Arm, benchmark: Benchmark, case: Case, expected: Sequence[Expected]) -> Verdict:
    """Compare all that the arm returns with the `expected_results` of the same case.

    The error may be that of rounding the exact result to its dtype, as often as the benchmark says
    of ours or of peers, times SLACK, and on top that of float32 sums. No single element may be off
    by more than the last bits of the largest: a row left out shows among a million.
    """
    with poison(expected):
        got = results(arm, benchmark, case)
    if len(got) != len(expected):
        return Verdict(None, None, f"{len(got)} results, not {len(expected)}")
    roundings = benchmark.roundings if arm.is_peer else benchmark.own_roundings
    verdicts = [
        _compare(tensor, right, benchmark.terms, roundings) for tensor, right in zip(got, expected)
    ]
    return max(verdicts, key=lambda verdict: (verdict.wrong is not None, _share(verdict)))


@contextmanager
def poison(expected: Sequence[Expected]) -> Iterator[None]:
    """Memory that an arm allocates for its results holds NaN, and no older results."""
    if expected[0].exact.device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not initialised
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
        return
    # The same would choose other algorithms on a GPU than those that are timed. There the caching
    # allocator hands out the freed blocks of the same sizes; an arm may take one for itself first.
    torch.cuda.empty_cache()
    blocks = [
        torch.full_like(right.exact, math.nan, dtype=right.dtype) for right in 2 * list(expected)
    ]
    del blocks
    yield


def _compare(got: Tensor | None, expected: Expected, terms: int, roundings: int) -> Verdict:
    name, exact, dtype = expected.name, expected.exact, expected.dtype
    if got is None:
        return Verdict(None, None, f"{name} is missing")
    if got.shape != exact.shape or got.dtype != dtype:
        right = f"{tuple(exact.shape)} {dtype}"
        return Verdict(None, None, f"{name} is {tuple(got.shape)} {got.dtype}, not {right}")
    if not got.isfinite().all():
        return Verdict(None, None, f"{name} holds NaN or infinity")
    arithmetic = WALK * math.sqrt(terms) * torch.finfo(torch.float32).eps
    rounding = math.sqrt(roundings) * _relative_error(exact.to(dtype), exact)
    bound, error = SLACK * rounding + arithmetic, _relative_error(got, exact)
    if error > bound:
        return Verdict(error, bound, f"{name} errs by {error:.1e}, more than {bound:.1e}")
    worst = ((got.double() - exact).abs().max() / exact.abs().max()).item()
    if worst > roundings * torch.finfo(dtype).eps + arithmetic:
        return Verdict(error, bound, f"one element of {name} is off by {worst:.1e} of the largest")
    return Verdict(error, bound)


def _share(verdict: Verdict) -> float:
    """How much of its bound an error takes."""
    return math.inf if not verdict.bound else (verdict.error or 0.0) / verdict.bound


def _relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()
