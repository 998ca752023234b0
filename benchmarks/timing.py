"""The time of a call, measured by CUDA graphs of many calls on a GPU, by a plain loop on a CPU.

A replay makes one call on each of many sets of buffers. On a GPU the L2 cache is overwritten
before it, and the sets together exceed 4 times that cache, so that every call finds its inputs in
device memory, as in a model. Everything runs on one side stream (`side_stream`): no graph can be
captured on the default stream, and a backward runs on the stream of its forward.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch

Call = Callable[[], Any]
Clock = Callable[[], float]  # seconds

MIN_SETS = 4
MAX_SETS = 1024  # the smallest latents would need 10,000 sets; graphs of 40 kernels a call get slow
QUEUE = 1000  # launches, of the 1024 that a GPU's queue holds
HOST_CALLS = 20  # few enough that 50 kernels each fit into the queue


@dataclass(frozen=True)
class Work:
    """A Work has the calls of one replay, and the scope that they are made in."""

    calls: Sequence[Call]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext

    def run(self) -> list[Any]:
        """Make the calls and return all their results, so that none reuses another's memory."""
        with self.scope():
            return [call() for call in self.calls]


@dataclass(frozen=True)
class Replay:
    """A Replay does the work once more. It keeps the work, whose memory the graph reads."""

    work: Work
    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is None:
            self.work.run()
        else:
            self.graph.replay()


@dataclass(frozen=True)
class Timing:
    """A Timing is the microseconds of a call, over the rounds."""

    median_us: float
    p10_us: float
    p90_us: float


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a new stream is the current one; on a CPU it does nothing."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def buffer_sets(bytes_a_call: int, device: torch.device) -> int:
    """Return how many calls, each on its own buffers, move more than 4 times the L2 cache."""
    if device.type == "cpu":
        return MIN_SETS
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(MIN_SETS, math.ceil(4 * l2 / bytes_a_call)), MAX_SETS)


def replay_of(work: Work, device: torch.device) -> Replay:
    """Warm the work up and, on a GPU, capture it."""
    work.run()  # compiles, loads modules, creates handles
    if device.type == "cpu":
        return Replay(work)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        results = work.run()
    del results  # their memory stays the graph's
    return Replay(work, graph)


class Stopwatch(Protocol):
    def start(self) -> None: ...

    def stop(self) -> None: ...

    def laps(self) -> list[float]:
        """Return the seconds from each start to its stop, since the last call."""


class HostStopwatch:
    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.times: list[float] = []

    def start(self) -> None:
        self.times.append(self.clock())

    def stop(self) -> None:
        self.times.append(self.clock())

    def laps(self) -> list[float]:
        times, self.times = self.times, []
        return [stop - start for start, stop in zip(times[::2], times[1::2])]


class CudaStopwatch:
    """A CudaStopwatch overwrites the L2 cache before it starts."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.scratch = torch.empty(4 * l2, dtype=torch.uint8, device=device)
        self.events: list[torch.cuda.Event] = []

    def start(self) -> None:
        self.scratch.zero_()
        self.stop()

    def stop(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def laps(self) -> list[float]:
        events, self.events = self.events, []
        events[-1].synchronize()
        pairs = zip(events[::2], events[1::2])
        return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]


def stopwatch_of(device: torch.device) -> Stopwatch:
    return HostStopwatch() if device.type == "cpu" else CudaStopwatch(device)


def wall_stopwatch(device: torch.device) -> Stopwatch:
    """Return a stopwatch of the time that a user waits, with what the host takes to launch."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return HostStopwatch(clock)


def interleave(replays: Sequence[Replay], rounds: int, stopwatch: Stopwatch) -> list[Timing]:
    """Time the replays A, B, C, A, B, C ..., so that a drift of the clocks affects all alike."""
    laps = []
    for _ in range(rounds):
        replays[-1]()  # keeps the GPU busy while the host queues the round
        for replay in replays:
            stopwatch.start()
            replay()
            stopwatch.stop()
        laps.append(stopwatch.laps())
    microseconds = 1e6 * np.array(laps) / [len(replay.work.calls) for replay in replays]
    p10, p50, p90 = np.percentile(microseconds, [10, 50, 90], axis=0).tolist()
    return [Timing(*values) for values in zip(p50, p10, p90)]


def host_us(
    work: Work, device: torch.device, rounds: int, kernels: float | None = None
) -> float | None:
    """Return the microseconds that a call keeps the host while the GPU works; None on a CPU.

    `kernels` is how many a call launches. Where nobody counted, 50 or fewer are assumed.
    """
    if device.type == "cpu":
        return None
    calls = max(1, min(HOST_CALLS, int(QUEUE / (kernels or 1))))
    samples = []
    with work.scope():
        for _ in range(rounds):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for i in range(calls):
                work.calls[i % len(work.calls)]()
            samples.append(time.perf_counter() - start)  # before the GPU is done
        torch.cuda.synchronize(device)
    return 1e6 * median(samples) / calls
