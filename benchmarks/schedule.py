"""The order of measurements, and which of them fit before a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .results import Case, Row
from .subject import Target


def by_value(targets: Iterable[Target], known: Iterable[Row], arms: Sequence[str]) -> list[Target]:
    """Put first the targets that were never timed on this GPU, or with other code than today's.

    `arms` are those that will run; only their code counts.
    """
    timed: dict[Case, dict[str, str | None]] = {}
    for row in known:
        if row.median_us:
            timed.setdefault(row.case, {})[row.arm] = row.fingerprint

    def settled(target: Target) -> bool:
        found = timed.get(target.case, {})
        ours = (arm for arm in target.arms if arm.ours and arm.name in {*arms} & {*found})
        return bool(found) and all(found[arm.name] == target.fingerprint(arm) for arm in ours)

    return sorted(targets, key=lambda target: (settled(target), *target.value))


def measure_until(
    deadline: float,
    targets: Sequence[Target],
    measure: Callable[[Target], list[Row]],
    least: Callable[[Target], float] = lambda _: 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Row]]:
    """Yield the rows of each target that should be done by the deadline, in seconds of the clock.

    A target is expected to take as long as the longest of its benchmark took so far. The first of a
    benchmark is expected to take as long as the longest of all, and at `least` so many seconds.
    Targets left out are named at the end.
    """
    longest: dict[str, float] = {}
    left_out = []
    for target in targets:
        start, name = clock(), target.benchmark
        if start + longest.get(name, max(least(target), *longest.values(), 0.0)) > deadline:
            left_out.append(target)
            continue
        yield measure(target)
        longest[name] = max(longest.get(name, 0.0), clock() - start)
    if left_out:
        print(_left_out(left_out, len(targets)), flush=True)


def _left_out(targets: Sequence[Target], total: int) -> str:
    kinds: dict[Any, list[str]] = {}
    for name, shape, dtype in (target.case for target in targets):
        kinds.setdefault(name, []).append(f"{'x'.join(map(str, shape))} {dtype}")
    lines = [f"- {kind}: {', '.join(cases)}" for kind, cases in kinds.items()]
    return "\n".join([f"\nLeft out for lack of time, {len(targets)} of {total}:\n", *lines])
