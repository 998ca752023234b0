"""Arithmetic of times, with clocks that say what they are told; and the order of a capture."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calls import CPU, OneRound, call_of, operator_target

from benchmarks import roofline
from benchmarks.measure import measure
from benchmarks.registry import Benchmark, find
from benchmarks.roofline import Roofline
from benchmarks.timing import (
    MAX_SETS,
    MIN_SETS,
    HostStopwatch,
    Replay,
    Timing,
    Work,
    buffer_sets,
    interleave,
    replay_of,
)

CUDA = torch.device("cuda:0")


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *microseconds: float) -> None:
        """The n-th call of this name takes the n-th time; the last holds on."""
        turn = min(self.log.count(name), len(microseconds) - 1)
        self.log.append(name)
        self.now += 1e-6 * microseconds[turn]


def test_rounds_are_interleaved_and_summarised() -> None:
    clock = Clock()
    # B's first time is that of the replay before the first round.
    times = {"A": [1.0, 2.0, 3.0, 4.0, 5.0], "B": [99.0, 20.0, 99.0, 20.0, 99.0, 30.0]}
    replays = [Replay(Work([partial(clock.takes, name, *us)])) for name, us in times.items()]
    a, b = interleave(replays, 5, HostStopwatch(clock))
    assert "".join(clock.log) == "BAB" * 5
    assert (a.p10_us, a.median_us, a.p90_us) == pytest.approx((1.4, 3.0, 4.6))
    assert b.median_us == pytest.approx(30.0)


def test_a_call_is_a_share_of_its_replay() -> None:
    clock = Clock()
    replay = Replay(Work([partial(clock.takes, "A", 7.0)] * 3))
    (timing,) = interleave([replay], 2, HostStopwatch(clock))
    assert timing.median_us == pytest.approx(7.0)


def test_percent_is_of_what_binds() -> None:
    roofline = Roofline(4000.0, 800.0, "invented")
    # 1 GB at 4000 GB/s needs 250 us, 1 TFLOP at 800 TFLOP/s needs 1250 us.
    assert roofline.percent(10**9, 0, 500.0) == pytest.approx(50.0)
    assert roofline.percent(10**9, 10**12, 2500.0) == pytest.approx(50.0)
    assert roofline.percent(10**9, 10**11, 500.0) == pytest.approx(50.0)


def test_the_ceilings_count_a_copy_twice_and_come_from_the_best_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[list[Any]] = []

    def interleave(replays: list[Replay], rounds: int, _: Any) -> list[Timing]:
        calls.append([call() for call in replays[0].work.calls])
        return [Timing(median_us=9e9, p10_us=1000.0, p90_us=9e9)]

    monkeypatch.setattr(roofline, "interleave", interleave)
    found = roofline.measure_roofline(CPU)
    # 16 MiB read and as many written, and 2 * 256^3 operations, each in a millisecond.
    assert found.copy_gb_s == pytest.approx(2 * 2**24 / 1e6)
    assert found.matmul_tflop_s == pytest.approx(2 * 256**3 / 1e9)
    copies, products = calls
    assert all(out.nbytes == 2**24 and out.dtype == torch.float32 for out in copies)
    assert copies[0].data_ptr() != copies[1].data_ptr()
    # Start-up and the cold cache, some 20 us, must be under 1 % of products of 1.4 ms each.
    assert len(products) * 1400 > 100 * 20


def planted(clock: Clock, eager: list[float], ours: float) -> Benchmark:
    """flow_interpolate whose arms take these microseconds a call."""
    (benchmark,) = find("flow_interpolate")

    def slow(name: str, us: list[float], function: Any, *args: Any, **named: Any) -> Any:
        clock.takes(name, *us)
        return function(*args, **named)

    example = benchmark.example
    function = partial(slow, "ours", [ours], example.function)
    return replace(
        benchmark,
        example=replace(example, function=function),
        eager=partial(slow, "eager", eager, benchmark.eager),
    )


def rows_of(benchmark: Benchmark, clock: Clock) -> list[Any]:
    session = OneRound(CPU, Roofline(4.0, 1.0, "invented"), clock)
    call = call_of(benchmark, (1, 4, 32, 32))
    return measure(session, operator_target(call), ["eager", "reference"])


def test_percent_and_ratio_of_a_row() -> None:
    clock = Clock()
    eager, reference = rows_of(planted(clock, [32.0], 16.0), clock)
    assert eager.bytes == 4 * 4096 * 4 + 4  # data, noise, x_t, velocity; t
    assert (eager.median_us, reference.median_us) == pytest.approx((32.0, 16.0))
    assert reference.percent == pytest.approx(100 * 65540 / 4e9 / 16e-6)
    assert (eager.peer_ratio, reference.peer_ratio) == pytest.approx((1.0, 2.0))
    assert eager.noise == pytest.approx(0.0, abs=1e-6)


def test_noise_is_how_far_the_same_arm_differs_from_itself() -> None:
    clock = Clock()
    # One call in the gate, 4 warm up, 4 warm up again for the pair, 4 keep the device busy, then
    # 4 are timed as the arm and 4 as its double.
    times = [1.0] * (1 + MIN_SETS * 3) + [40.0] * MIN_SETS + [41.0] * MIN_SETS
    eager, reference = rows_of(planted(clock, times, 10.0), clock)
    assert eager.median_us == pytest.approx(40.0)
    assert eager.noise == reference.noise == pytest.approx(2.5)


def test_buffers_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = 60_000_000
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=cache)
    )
    assert buffer_sets(10**6, CUDA) == 240
    assert buffer_sets(10**6 + 1, CUDA) * (10**6 + 1) > 4 * cache - 10**6
    assert buffer_sets(10**9, CUDA) == MIN_SETS
    assert buffer_sets(1000, CUDA) == MAX_SETS
    assert buffer_sets(1000, CPU) == MIN_SETS


def test_capture_comes_after_the_warm_up_and_keeps_all_results_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[Any] = []
    alive: list[int] = []

    class Result:
        def __init__(self) -> None:
            alive.append(id(self))
            log.append(f"call, {len(alive)} alive")

        def __del__(self) -> None:
            alive.remove(id(self))

    @contextmanager
    def capture(graph: Any, stream: Any) -> Any:
        log.append(f"capture on {stream}")
        yield
        log.append(f"captured, {len(alive)} alive")

    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "the side stream")
    replay_of(Work([Result, Result]), CUDA)()
    calls = ["call, 1 alive", "call, 2 alive"]
    capturing = ["capture on the side stream", *calls, "captured, 2 alive"]
    assert log == [*calls, "synchronize", *capturing, "replay"]
    assert not alive


def test_scope_holds_while_the_calls_run() -> None:
    depth = 0
    seen = []

    @contextmanager
    def scope() -> Any:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    replay_of(Work([lambda: seen.append(depth)], scope), CPU)()
    assert seen == [1, 1] and depth == 0
