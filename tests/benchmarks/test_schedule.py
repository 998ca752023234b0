"""What comes first, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks import operators
from benchmarks.arms import Arm, peer
from benchmarks.registry import find
from benchmarks.results import Row
from benchmarks.schedule import by_value, measure_until
from benchmarks.subject import Target

ARMS = peer("eager", len), Arm("triton", ours=True), Arm("cuda", ours=True)


def row(name: str, fingerprint: str | None = "old", arm: str = "triton") -> Row:
    return Row(name, name, (1,), "bfloat16", 8, 0, arm, median_us=1.0, fingerprint=fingerprint)


def drawn_too_soon() -> None:
    raise AssertionError("a target is drawn when it is measured")


def target(name: str, place: int = 0, family: str = "adaln") -> Target:
    return Target(
        op=name,
        family=family,
        benchmark=name,
        shape=(1,),
        dtype="bfloat16",
        place=place,
        arms=ARMS,
        fingerprint=lambda arm: "new" if arm.ours else None,
        draw=drawn_too_soon,  # type: ignore[arg-type]
    )


def test_what_nobody_timed_or_has_changed_comes_first_and_by_value_inside() -> None:
    known = [row("known", "new"), row("known", None, "eager"), row("known", "new", "cuda")]
    known += [row("changed", "old"), row("changed", None, "eager")]
    known += [replace(row("other"), dtype="x"), replace(row("failed", "new"), median_us=None)]
    targets = [target("known"), target("changed", 0, "tokens"), target("second", 1)]
    targets += [target("first", 0, "attention"), target("other", 2), target("failed", 3)]
    order = [found.benchmark for found in by_value(targets, known, ["triton", "cuda"])]
    assert order == ["first", "changed", "second", "other", "failed", "known"]


def test_operators_in_bfloat16_first_then_every_first_shape_by_family() -> None:
    benchmarks = [find("merge_tokens")[0], find("gate_residual")[0]]
    names = [benchmark.name for benchmark in benchmarks]
    targets = [t for t in operators.targets(FakeGpu()) if t.benchmark in names]
    cases = [found.case for found in by_value(targets, [], ["triton"])]
    tokens, gate = (benchmark.shapes for benchmark in benchmarks)
    assert cases[:4] == [
        ("gate_residual", gate[0], "bfloat16"),
        ("merge_tokens", tokens[0], "bfloat16"),
        ("gate_residual", gate[1], "bfloat16"),
        ("merge_tokens", tokens[1], "bfloat16"),
    ]
    assert len(benchmarks[0].dtypes) * (len(gate) + len(tokens)) == len(cases)
    assert [dtype for *_, dtype in cases] == sorted(dtype for *_, dtype in cases)
    for found in targets:
        prints = {arm.name: found.fingerprint(arm) for arm in found.arms}
        assert {name for name, value in prints.items() if value} == {"reference", "triton", "cuda"}


class FakeGpu(torch.Generator):
    device = torch.device("cuda:0")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def measure(self, seconds: dict[str, float]) -> Callable[[Target], list[Row]]:
        """Each target takes as long as its name says."""

        def measure(found: Target) -> list[Row]:
            self.now += seconds[found.benchmark]
            return [row(found.benchmark)]

        return measure


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
    clock = Clock()
    targets = [target(name) for name in ("short", "long", "short", "long", "short")]
    measure = clock.measure({"short": 1.0, "long": 8.0})
    found = measure_until(deadline, targets, measure, clock=clock)
    assert [rows[0].benchmark for rows in found] == measured
    said = capsys.readouterr().out
    left = len(targets) - len(measured)
    assert said.startswith(f"\nLeft out for lack of time, {left} of 5:\n") if left else not said
    assert said.count("1 bfloat16") == left


@pytest.mark.parametrize(("deadline", "measured"), [(5.9, ["short"]), (6.0, ["short", "new"])])
def test_a_kind_may_be_known_to_take_long(deadline: float, measured: list[str]) -> None:
    clock = Clock()
    targets, measure = [target("short"), target("new")], clock.measure({"short": 1.0, "new": 5.0})
    least = {"short": 0.0, "new": 5.0}
    found = measure_until(deadline, targets, measure, lambda target: least[target.benchmark], clock)
    assert [rows[0].benchmark for rows in found] == measured
