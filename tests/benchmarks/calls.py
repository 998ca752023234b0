"""Calls to compare arms on, and sessions that time them without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.arms import Arm, peer
from benchmarks.gate import Verdict, check
from benchmarks.measure import Session
from benchmarks.operators import OperatorCall, dtype_name
from benchmarks.registry import Benchmark
from benchmarks.roofline import Roofline
from benchmarks.subject import Subject, Target
from benchmarks.timing import Clock, HostStopwatch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class OneRound(Session):
    """A session that times each arm once, by a clock."""

    clock: Clock = time.perf_counter

    def rounds(self, subject: Subject) -> int:
        return 1

    def stopwatch(self, subject: Subject) -> HostStopwatch:
        return HostStopwatch(self.clock)


def session() -> Session:
    return OneRound(CPU, Roofline(10.0, 1.0, "invented"))


def call_of(
    benchmark: Benchmark, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> OperatorCall:
    return OperatorCall(benchmark, shape, dtype, torch.Generator().manual_seed(0))


def verdict(
    call: OperatorCall, function: Callable[..., Any] | None = None, ours: bool = False
) -> Verdict:
    """What the gate says of our operator, or of a function in its place, as ours or as a peer."""
    if function is None:
        arm = Arm("reference", ours=True)
    elif ours:
        arm = Arm("triton", ours=True, prepare=lambda _: partial(function, **call.options))
    else:
        arm = peer("eager", function)
    return check(call.results(arm), call.expected(), call.tolerance(arm))


def target_of(subject: Subject, arms: tuple[Arm, ...], seconds: float = 0.0) -> Target:
    row = subject.row
    return Target(
        op=row.op,
        family="adaln",
        benchmark=row.benchmark,
        shape=row.shape,
        dtype=row.dtype,
        place=0,
        arms=arms,
        fingerprint=lambda arm: "now" if arm.ours else None,
        draw=lambda: subject,
        seconds=seconds,
    )


def operator_target(call: OperatorCall) -> Target:
    assert call.row.dtype == dtype_name(call.dtype)
    return target_of(call, call.benchmark.arms)
