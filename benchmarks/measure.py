"""One benchmark at one shape and dtype: check the arms, time those that are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

import msf_kernels

from . import fingerprint
from .arms import OURS, Arm, runnable_arms, work
from .gate import check, expected_results
from .registry import Benchmark, Case, Shape, draw
from .results import Row
from .roofline import Roofline
from .timing import Replay, Stopwatch, buffer_sets, host_us, interleave, replay_of

AGAIN = "again"  # the first arm once more, captured anew: the A/A pair


@dataclass(frozen=True)
class Session:
    """What all measurements of a run share."""

    generator: torch.Generator
    roofline: Roofline
    stopwatch: Stopwatch
    rounds: int

    @property
    def device(self) -> torch.device:
        return self.generator.device


def measure(
    session: Session, benchmark: Benchmark, shape: Shape, dtype: torch.dtype, names: Sequence[str]
) -> list[Row]:
    """A row for each arm named that the benchmark has, in that order."""
    torch.compiler.reset()  # Dynamo gives up after 8 static shapes of one function
    arms, skipped = runnable_arms(benchmark, names, session.device)
    case = draw(benchmark, shape, dtype, session.generator)
    blank = Row(
        op=benchmark.op,
        benchmark=benchmark.name,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        bytes=benchmark.bytes(*case.args),
        flops=benchmark.flops(*case.args),
        sizes=benchmark.sizes(shape),
    )
    rows = _check(blank, arms, benchmark, case)
    correct = [arm for arm in arms if rows[arm.name].status == "ok"]
    if correct:
        sets = buffer_sets(blank.bytes, session.device)
        cases = [draw(benchmark, shape, dtype, session.generator) for _ in range(sets)]
        rows |= _time(session, rows, correct, benchmark, cases)
    for name, reason in skipped.items():
        rows[name] = replace(blank, arm=name, status="skipped", note=reason)
    return [rows[name] for name in names if name in rows]


def _check(blank: Row, arms: Sequence[Arm], benchmark: Benchmark, case: Case) -> dict[str, Row]:
    rows, expected = {}, expected_results(benchmark, case)
    for arm in arms:
        ours = None if arm.is_peer else fingerprint.of_operator(benchmark.op, arm.name)
        row = replace(blank, arm=arm.name, fingerprint=ours)
        try:
            verdict = check(arm, benchmark, case, expected)
        except msf_kernels.BackendUnavailable as error:  # with these arguments
            rows[arm.name] = replace(row, status="skipped", note=str(error))
            continue
        except Exception as error:
            rows[arm.name] = _failed(row, error)
            continue
        status = "incorrect" if verdict.wrong else "ok"
        rows[arm.name] = replace(
            row, status=status, note=verdict.wrong, error=verdict.error, bound=verdict.bound
        )
    return rows


def _time(
    session: Session,
    rows: dict[str, Row],
    arms: Sequence[Arm],
    benchmark: Benchmark,
    cases: Sequence[Case],
) -> dict[str, Row]:
    """The rows of the arms, with their times."""
    first = arms[0]
    timed = {arm.name: rows[arm.name] for arm in arms} | {AGAIN: rows[first.name]}
    replays: dict[str, Replay] = {}
    for arm in [*arms, replace(first, name=AGAIN)]:
        row = timed[arm.name]
        try:
            calls = work(arm, benchmark, cases)
            replay = replay_of(calls, session.device)
            timed[arm.name] = replace(row, host_us=host_us(calls, session.device, session.rounds))
        except Exception as error:
            timed[arm.name] = _failed(row, error)
        else:
            replays[arm.name] = replay
    if not replays:
        return timed
    timings = interleave(list(replays.values()), session.rounds, session.stopwatch)
    for name, timing in zip(replays, timings):
        row = timed[name]
        percent = session.roofline.percent(row.bytes, row.flops, timing.median_us)
        timed[name] = replace(row, **asdict(timing), percent=percent)
    return _compare(timed, timed.pop(AGAIN), timed[first.name])


def _compare(timed: dict[str, Row], again: Row, first: Row) -> dict[str, Row]:
    """The rows with the noise of the A/A pair, and how they stand to the best peer."""
    noise = None
    if first.median_us and again.median_us:
        noise = 100 * abs(again.median_us / first.median_us - 1)
    peers = [row.median_us for row in timed.values() if row.arm not in OURS and row.median_us]
    best = min(peers, default=None)
    return {
        name: replace(
            row, noise=noise, peer_ratio=best / row.median_us if best and row.median_us else None
        )
        for name, row in timed.items()
    }


def _failed(row: Row, error: Exception) -> Row:
    lines = str(error).strip().splitlines() or ["no message"]
    return replace(row, status="failed", note=f"{type(error).__name__}: {lines[0]}")
