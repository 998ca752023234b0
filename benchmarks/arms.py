"""The implementations that are compared, each ready to be called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

import msf_kernels
from msf_kernels.dispatch import BACKENDS

from .peers import Peer, compiled
from .registry import Benchmark, Case, tensors
from .timing import Call, Work

# All arms of these names are ours; those of no backend are peers.
OURS = {*BACKENDS, *(name for op in msf_kernels.OPERATORS for name in msf_kernels.backends_of(op))}


def peers_of(benchmark: Benchmark) -> tuple[Peer, ...]:
    """Plain PyTorch, torch.compile of it, and the benchmark's own."""
    eager = benchmark.eager
    return Peer("eager", eager), Peer("compile", compiled(eager)), *benchmark.peers


def names_of(benchmarks: Sequence[Benchmark]) -> tuple[str, ...]:
    """The arms that these benchmarks have: peers, then ours, then ours on other libraries."""
    peers = (peer.name for benchmark in benchmarks for peer in peers_of(benchmark))
    libraries = (name for benchmark in benchmarks for name in msf_kernels.backends_of(benchmark.op))
    return tuple(dict.fromkeys((*peers, *reversed(BACKENDS), *libraries)))


@dataclass(frozen=True)
class Arm:
    """One implementation of a benchmark; `scope` holds while its function runs."""

    name: str
    function: Callable[..., Any]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def is_peer(self) -> bool:
        return self.name not in OURS


def runnable_arms(
    benchmark: Benchmark, names: Iterable[str], device: torch.device
) -> tuple[list[Arm], dict[str, str]]:
    """The arms of these names that can run on the device, and for the others why not.

    Names that the benchmark does not have are neither.
    """
    known = names_of([benchmark])
    names = [name for name in names if name in known]
    peers = {peer.name: peer for peer in peers_of(benchmark)}
    reasons = msf_kernels.explain_choice(benchmark.op, device).unsupported_reasons
    reasons |= {name: peers[name].unsupported_reason(device) for name in names if name in peers}
    if device.type == "cpu":
        for name in set(BACKENDS) - {"reference"}:
            reasons[name] = reasons[name] or "without a GPU it is only emulated"
    skipped = {name: reason for name in names if (reason := reasons[name])}
    return [
        _peer(peers[name]) if name in peers else _backend(benchmark, name)
        for name in names
        if name not in skipped
    ], skipped


def _peer(peer: Peer) -> Arm:
    @contextmanager
    def scope() -> Iterator[None]:
        # A compiled backward that is called again must not overwrite what the forward saved.
        with torch._functorch.config.patch(donated_buffer=False), peer.scope():
            yield

    return Arm(peer.name, peer.function, scope)


def _backend(benchmark: Benchmark, name: str) -> Arm:
    request = name if name in BACKENDS else f"auto,{benchmark.op}={name}"
    return Arm(name, benchmark.ours, partial(msf_kernels.backend, request))


def gradients(
    outputs: Sequence[Tensor], benchmark: Benchmark, case: Case
) -> tuple[Tensor | None, ...]:
    """Of the benchmark's first arguments; None where an output does not depend on one.

    The graph stays, so that the backward can be called again without its forward.
    """
    inputs = case.args[: benchmark.gradients]
    return torch.autograd.grad(
        outputs, inputs, case.cotangents, retain_graph=True, allow_unused=True
    )


def results(arm: Arm, benchmark: Benchmark, case: Case) -> tuple[Tensor | None, ...]:
    """The outputs and, where the backward is measured, the gradients."""
    with arm.scope():
        outputs = tensors(arm.function(*case.args))
        grads = gradients(outputs, benchmark, case) if benchmark.gradients else ()
    return *(output.detach() for output in outputs), *grads


def work(arm: Arm, benchmark: Benchmark, cases: Iterable[Case]) -> Work:
    """What is timed: one forward for each case, or one backward, its forward being done here."""

    def call(case: Case) -> Call:
        if not benchmark.gradients:
            return partial(arm.function, *case.args)
        return partial(gradients, tensors(arm.function(*case.args)), benchmark, case)

    with arm.scope():
        return Work([call(case) for case in cases], arm.scope)
