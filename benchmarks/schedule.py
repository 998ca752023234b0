"""What is measured first where there may not be time for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from .results import AnyRow, RowType


@dataclass(frozen=True)
class Group(Generic[RowType]):
    """What is measured together: all arms of a benchmark at one shape and dtype, or all ways of a
    model at one size.

    Args:
        case: that of its rows; its first part, a benchmark or what of a model, is the kind of
            group, of which all are expected to take as long.
        value: sort key; of two groups that both need a measurement the smaller comes first.
        fingerprints: the hash of our code as it is now, by arm or way.
        measure: takes the measurement and returns its rows.
        seconds: the least time of one, used until one of its kind was timed.
    """

    case: tuple[Any, ...]
    value: tuple[int, ...]
    fingerprints: Mapping[str, str]
    measure: Callable[[], list[RowType]]
    seconds: float = 0.0


def by_value(groups: Iterable[Group[RowType]], known: Iterable[AnyRow]) -> list[Group[RowType]]:
    """First what nobody timed on this GPU, or timed with other code than today's; then the rest."""
    timed: dict[tuple[Any, ...], dict[str, str | None]] = {}
    for row in known:
        if row.us:
            timed.setdefault(row.case, {})[row.name] = row.fingerprint

    def settled(group: Group[RowType]) -> bool:
        found = timed.get(group.case, {})
        ours = {name: now for name, now in group.fingerprints.items() if name in found}
        return bool(found) and all(found[name] == now for name, now in ours.items())

    return sorted(groups, key=lambda group: (settled(group), *group.value))


def measure_until(
    deadline: float,
    groups: Sequence[Group[RowType]],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[RowType]]:
    """The rows of each group that should be done at the deadline, in seconds of the clock.

    A group is expected to take as long as the longest of its kind took so far, or, the first of its
    kind, as the longest of all and its `seconds`. Those left out are named at the end.
    """
    longest: dict[Any, float] = {}
    left_out = []
    for group in groups:
        kind, start = group.case[0], clock()
        if start + longest.get(kind, max(group.seconds, *longest.values(), 0.0)) > deadline:
            left_out.append(group)
            continue
        yield group.measure()
        longest[kind] = max(longest.get(kind, 0.0), clock() - start)
    if left_out:
        print(_left_out(left_out, len(groups)), flush=True)


def _left_out(groups: Sequence[Group], total: int) -> str:
    kinds: dict[Any, list[str]] = {}
    for kind, *rest in (group.case for group in groups):
        kinds.setdefault(kind, []).append(" ".join(map(_text, rest)))
    lines = [f"- {kind}: {', '.join(cases)}" for kind, cases in kinds.items()]
    return "\n".join([f"\nLeft out for lack of time, {len(groups)} of {total}:\n", *lines])


def _text(part: Any) -> str:
    return "x".join(map(str, part)) if isinstance(part, tuple) else str(part)
