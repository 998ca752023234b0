"""All ways to run a model at one size: check each, time those that are right."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import fingerprint
from .roofline import Roofline
from .rows import Row
from .timing import Replay, Stopwatch, Work, interleave
from .transformers import EAGER, Way

SLACK = 2.0  # a way that errs more than so many times as plain PyTorch is wrong


class Subject(Protocol):
    """What the ways run: `row` says which, `exact` is what a call of `work` should give."""

    @property
    def row(self) -> Row: ...

    def suits(self, way: Way) -> bool: ...

    def exact(self) -> tuple[Tensor, ...]: ...

    def work(self, way: Way) -> Work: ...

    def replay(self, work: Work, device: torch.device) -> Replay: ...

    def stopwatch(self, device: torch.device) -> Stopwatch: ...


def compare(
    subject: Subject,
    ways: Sequence[Way],
    device: torch.device,
    roofline: Roofline,
    rounds: int,
) -> list[Row]:
    """A row for each way, in that order; plain PyTorch always runs, as it sets the bound."""
    torch.compiler.reset()  # frees the graphs of the last comparison
    # Not on the device: a result of the float64 pass would keep all of a larger block of memory in
    # use, whose rest the ways then fill, and `peak_mib` would say they need nothing.
    exact, bound = tuple(tensor.cpu() for tensor in subject.exact()), math.inf
    rows, replays = {}, {}
    for way in dict.fromkeys((EAGER, *ways)):
        row, held = replace(subject.row, way=way.name), _reserved(device)
        if way.ours:
            row = replace(row, fingerprint=fingerprint.of_models())
        try:
            work = subject.work(way)
            worst = _worst_error(work.run()[0], exact)
            if way is EAGER:
                bound = SLACK * worst
            row = replace(row, error=worst if worst < math.inf else None)
            if worst <= bound < math.inf:
                row = replace(row, **_profile(work, device, held, row.steps))
                replays[way] = subject.replay(work, device)
            else:
                note = f"errs by {worst:.1e}, more than {bound:.1e}"
                row = replace(row, status="incorrect", note=note)
        except Exception as error:
            row = row.failed(error)
        rows[way] = row
    replays = {way: replay for way, replay in replays.items() if way in ways}
    if replays:
        timings = interleave(list(replays.values()), rounds, subject.stopwatch(device))
        for way, timing in zip(replays, timings):
            rows[way] = rows[way].timed(timing, roofline)
    return [rows[way] for way in ways]


def _worst_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Relative L2; of a batch of images only the first may be known exactly."""
    pairs = zip(results, exact, strict=True)
    errors = [_relative_error(got[: len(right)], right) for got, right in pairs]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _relative_error(got: Tensor, exact: Tensor) -> float:
    exact = exact.to(got.device).double()
    return ((got.double() - exact).norm() / exact.norm()).item()


def _reserved(device: torch.device) -> int:
    """Bytes of device memory in use, those of CUDA graphs among them."""
    if device.type == "cpu":
        return 0
    gc.collect()  # graphs of autograd and compiled functions lie in cycles
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _profile(work: Work, device: torch.device, held: int, steps: int) -> dict[str, Any]:
    """Kernels a step and memory of a call, `held` bytes having been in use before its way came."""
    if device.type == "cpu":
        return {}
    _reserved(device)  # gives back what is free
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
