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
        case: that of its rows; the first of it, a benchmark or what of a model, tells how long
            such a group takes.
        value: of two groups that are needed alike, the smaller is measured first.
        fingerprints: of our code as it is now, by arm or way.
        measure: does it.
        seconds: that it is known to take at least, before one of its kind was measured.
    """

    case: tuple[Any, ...]
    value: tuple[int, ...]
    fingerprints: Mapping[str, str]
    measure: Callable[[], list[RowType]]
    seconds: float = 0.0


def by_value(groups: Iterable[Group[RowType]], known: Iterable[AnyRow]) -> list[Group[RowType]]:
    """First what nobody measured on this GPU, then what was measured with other code than today's,
    then the rest."""
    measured: dict[tuple[Any, ...], list[AnyRow]] = {}
    for row in known:
        measured.setdefault(row.case, []).append(row)

    def need(group: Group[RowType]) -> int:
        rows = measured.get(group.case)
        if not rows:
            return 0
        changed = any(
            row.fingerprint and row.fingerprint != group.fingerprints.get(row.name, row.fingerprint)
            for row in rows
        )
        return 1 if changed else 2

    return sorted(groups, key=lambda group: (need(group), *group.value))


def until(
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
