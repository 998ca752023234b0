"""The measurement of one target: its arms are checked, and those that are right are timed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import msf_kernels

from .arms import Arm
from .gate import Expected, check
from .results import Row
from .roofline import Roofline
from .subject import Subject, Target
from .timing import (
    Replay,
    Stopwatch,
    Work,
    host_us,
    interleave,
    replay_of,
    stopwatch_of,
    wall_stopwatch,
)


@dataclass(frozen=True)
class Session:
    """A Session is what all measurements of a run share."""

    device: torch.device
    roofline: Roofline

    def rounds(self, subject: Subject) -> int:
        """Return how often each arm is timed. A whole call takes seconds and varies less."""
        if self.device.type == "cpu":
            return 5
        return 10 if subject.whole else 15

    def stopwatch(self, subject: Subject) -> Stopwatch:
        return (wall_stopwatch if subject.whole else stopwatch_of)(self.device)


def measure(session: Session, target: Target, names: Sequence[str]) -> list[Row]:
    """Return a row for each of the target's arms that is named, in the target's order."""
    torch.compiler.reset()  # Dynamo gives up after 8 static shapes of one function
    reserved(session.device)  # frees the last target's memory: models lie in cycles
    arms = [arm for arm in target.arms if arm.name in names]
    rows, able = {}, []
    for arm in arms:
        row = Row(target.op, target.benchmark, target.shape, target.dtype, 0, 0, arm.name)
        if reason := arm.unsupported_reason(session.device):
            rows[arm.name] = replace(row, status="skipped", note=reason)
        else:
            rows[arm.name] = replace(row, fingerprint=target.fingerprint(arm))
            able.append(arm)
    if not able:
        return list(rows.values())
    try:
        subject = target.draw()
        of_subject, expected = subject.row, subject.expected()
    except Exception as error:  # without the right results no arm can be checked
        return [row if row.status == "skipped" else _failed(row, error) for row in rows.values()]
    replays: dict[str, Replay] = {}
    for arm in able:
        row = replace(of_subject, arm=arm.name, fingerprint=rows[arm.name].fingerprint)
        rows[arm.name], replay = _check(session, subject, arm, row, expected)
        if replay:
            replays[arm.name] = replay
    if replays:
        first = next(arm for arm in able if arm.name in replays)
        rows |= _time(session, subject, rows, replays, _again(session, subject, first))
    return _compare(list(rows.values()), {arm.name for arm in arms if not arm.ours})


def _check(
    session: Session, subject: Subject, arm: Arm, row: Row, expected: Sequence[Expected]
) -> tuple[Row, Replay | None]:
    """Check the arm. Return its row and, where it is right, the replay to time."""
    held = reserved(session.device) if row.images else 0
    try:
        verdict = check(subject.results(arm), expected, subject.tolerance(arm))
        row = replace(row, error=verdict.error, bound=verdict.bound)
        if verdict.wrong:
            return replace(row, status="incorrect", note=verdict.wrong), None
        work = subject.work(arm)
        if row.images:
            row = replace(row, **_profile(work, session.device, held, row.steps))
        if subject.whole:
            return row, Replay(work)
        replay = replay_of(work, session.device)
        taken = host_us(work, session.device, session.rounds(subject), row.kernels)
        return replace(row, host_us=taken), replay
    except msf_kernels.BackendUnavailable as error:  # it declines these arguments
        return replace(row, status="skipped", note=str(error)), None
    except Exception as error:
        return _failed(row, error), None


def _again(session: Session, subject: Subject, first: Arm) -> Replay | None:
    """Capture the first arm a second time, for the A/A pair; None where that fails.

    A whole subject has none: it would make the same calls again, and they take too long.
    """
    try:
        return None if subject.whole else replay_of(subject.work(first), session.device)
    except Exception:  # for instance too little memory; the noise stays unknown
        return None


def _time(
    session: Session,
    subject: Subject,
    rows: dict[str, Row],
    replays: dict[str, Replay],
    again: Replay | None,
) -> dict[str, Row]:
    """Time the replays and return their rows. `again`, the first arm once more, shows the noise."""
    every = [*replays.values(), *([again] if again else [])]
    timings = interleave(every, session.rounds(subject), session.stopwatch(subject))
    noise = 100 * abs(timings[-1].median_us / timings[0].median_us - 1) if again else None
    return {
        name: replace(
            rows[name],
            **asdict(timing),
            percent=session.roofline.percent(rows[name].bytes, rows[name].flops, timing.median_us),
            noise=noise,
        )
        for name, timing in zip(replays, timings)
    }


def _compare(rows: Sequence[Row], peers: set[str]) -> list[Row]:
    """Return the rows with their speed relative to the best peer's."""
    times = [row.median_us for row in rows if row.arm in peers and row.median_us]
    best = min(times, default=None)
    return [
        replace(row, peer_ratio=best / row.median_us) if best and row.median_us else row
        for row in rows
    ]


def _failed(row: Row, error: Exception) -> Row:
    lines = str(error).strip().splitlines() or ["no message"]
    return replace(row, status="failed", note=f"{type(error).__name__}: {lines[0]}")


def reserved(device: torch.device) -> int:
    """Return the bytes of device memory in use, those of CUDA graphs among them."""
    if device.type == "cpu":
        return 0
    gc.collect()  # graphs of autograd and compiled functions lie in cycles
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _profile(work: Work, device: torch.device, held: int, steps: int) -> dict[str, Any]:
    """Return the kernels a step and the memory of a call.

    `held` bytes were in use before the arm's first call.
    """
    if device.type == "cpu":
        return {}
    reserved(device)  # releases what is free
    torch.cuda.reset_peak_memory_stats(device)
    work.run()
    peak = torch.cuda.max_memory_reserved(device) - held
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work.run()
        torch.cuda.synchronize(device)
    kernels = sum(map(_is_kernel, profiler.events()))
    return {"kernels": kernels / steps, "peak_mib": peak / 2**20}


def _is_kernel(event: Any) -> bool:
    copies = event.name.startswith(("Memcpy", "Memset"))
    return event.device_type == DeviceType.CUDA and not (copies or event.is_user_annotation)
