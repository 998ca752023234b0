"""What comes first, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.measure import Session
from benchmarks.registry import find
from benchmarks.results import Row
from benchmarks.roofline import Roofline
from benchmarks.run import groups_of
from benchmarks.schedule import Group, by_value, measure_until
from benchmarks.timing import HostStopwatch


def row(name: str, fingerprint: str | None = "old", arm: str = "triton") -> Row:
    return Row(name, name, (1,), "bfloat16", 8, 0, arm, median_us=1.0, fingerprint=fingerprint)


def group(name: str, *value: int, measure: Callable[[], list[Row]] = list) -> Group[Row]:
    return Group((name, (1,), "bfloat16"), value, {"triton": "new"}, measure)


def test_what_nobody_timed_or_has_changed_comes_first_and_by_value_inside() -> None:
    known = [row("known", "new"), row("known", None, "eager"), row("known", "old", "cuda")]
    known += [row("changed", "old"), row("changed", None, "eager")]
    known += [replace(row("other"), dtype="x"), replace(row("failed", "new"), median_us=None)]
    groups = [group("known", 0), group("changed", 0, 7), group("second", 1), group("first", 0, 5)]
    groups += [group("other", 2), group("failed", 3)]
    order = [found.case[0] for found in by_value(groups, known)]
    assert order == ["first", "changed", "second", "other", "failed", "known"]


def test_operators_in_bfloat16_first_then_every_first_shape_by_family() -> None:
    session = Session(torch.Generator(), Roofline(1, 1, ""), HostStopwatch(), rounds=1)
    session = replace(session, generator=FakeGpu())
    benchmarks = [find("merge_tokens")[0], find("gate_residual")[0]]
    groups = [g for benchmark in benchmarks for g in groups_of(benchmark, session, ["triton"])]
    cases = [found.case for found in by_value(groups, [])]
    tokens, gate = (benchmark.shapes for benchmark in benchmarks)
    assert cases[:4] == [
        ("gate_residual", gate[0], "bfloat16"),
        ("merge_tokens", tokens[0], "bfloat16"),
        ("gate_residual", gate[1], "bfloat16"),
        ("merge_tokens", tokens[1], "bfloat16"),
    ]
    assert len(benchmarks[0].dtypes) * (len(gate) + len(tokens)) == len(cases)
    assert [dtype for *_, dtype in cases] == sorted(dtype for *_, dtype in cases)
    assert all(set(found.fingerprints) == {"triton"} for found in groups)


class FakeGpu(torch.Generator):
    device = torch.device("cuda:0")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float) -> list[Row]:
        self.now += seconds
        return [row(name)]


@pytest.mark.parametrize(
    ("deadline", "measured"),
    [
        (100.0, ["short", "long", "short", "long", "short"]),
        # After 1 + 8 + 1 seconds the second long one would end at 18, a short one at 11.
        (17.9, ["short", "long", "short", "short"]),
        # Nobody knows how long the first long one takes: as long as the longest so far.
        (1.9, ["short"]),
        (2.0, ["short", "long"]),
        (-1.0, []),
    ],
)
def test_a_group_that_would_end_late_is_left_out(
    deadline: float, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    clock, seconds = Clock(), {"short": 1.0, "long": 8.0}
    groups = [
        group(name, measure=partial(clock.takes, name, seconds[name]))
        for name in ("short", "long", "short", "long", "short")
    ]
    found = [rows[0].benchmark for rows in measure_until(deadline, groups, clock)]
    assert found == measured
    said = capsys.readouterr().out
    left = len(groups) - len(measured)
    assert said.startswith(f"\nLeft out for lack of time, {left} of 5:\n") if left else not said
    assert said.count("1 bfloat16") == left


@pytest.mark.parametrize(("deadline", "measured"), [(5.9, ["short"]), (6.0, ["short", "new"])])
def test_a_kind_may_be_known_to_take_long(deadline: float, measured: list[str]) -> None:
    clock = Clock()
    short = group("short", measure=partial(clock.takes, "short", 1.0))
    new = replace(group("new", measure=partial(clock.takes, "new", 5.0)), seconds=5.0)
    assert [rows[0].benchmark for rows in measure_until(deadline, [short, new], clock)] == measured
