"""The implementations that are compared, each ready to be called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

import msf_kernels
from msf_kernels.backend import BACKENDS

from .registry import Benchmark, Case, tensors
from .timing import Call, Work

PEERS = ("eager", "compile", "compile-no-mix", "cudnn-frontend")  # the first two of every benchmark
LIBRARIES = tuple(
    dict.fromkeys(
        name
        for op in msf_kernels.OPERATORS
        for name in msf_kernels.backends_of(op)
        if name not in BACKENDS
    )
)
ARMS = (*PEERS, *reversed(BACKENDS), *LIBRARIES)


def arms_of(benchmark: Benchmark, names: Iterable[str]) -> list[str]:
    """Of these names those that the benchmark has: libraries are backends of some operators, and
    most have two peers only."""
    known = {*PEERS[:2], *benchmark.peers, *BACKENDS, *msf_kernels.backends_of(benchmark.op)}
    return [name for name in names if name in known]


@dataclass(frozen=True)
class Arm:
    """One implementation of a benchmark; `scope` holds while its function runs."""

    name: str
    function: Callable[..., Any]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def is_peer(self) -> bool:
        return self.name in PEERS


def runnable_arms(
    benchmark: Benchmark, names: Iterable[str], device: torch.device
) -> tuple[list[Arm], dict[str, str]]:
    """The arms of these names that can run on the device, and for the others why not.

    Names that the benchmark does not have are neither.
    """
    names = arms_of(benchmark, names)
    reasons = msf_kernels.explain_backends(benchmark.op, device)
    if device.type == "cpu":
        for name in set(BACKENDS) - {"reference"}:
            reasons[name] = reasons[name] or "without a GPU it is only emulated"
    skipped = {name: reason for name in names if (reason := reasons.get(name))}
    arms = []
    for name in names:
        if name not in skipped:
            try:
                arms.append(_arm(benchmark, name))
            except ImportError as error:
                skipped[name] = str(error)
    return arms, skipped


def _arm(benchmark: Benchmark, name: str) -> Arm:
    if name == "eager":
        return Arm(name, benchmark.eager)
    if name in PEERS:
        # Static shapes, as one shape after the other would make the second compilation dynamic.
        # A backward that is called again must not overwrite what the forward saved.
        compiled = partial(torch.compile, benchmark.eager, dynamic=False, fullgraph=True)
        function = benchmark.peers.get(name, compiled)()
        return Arm(name, function, partial(torch._functorch.config.patch, donated_buffer=False))
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
