"""The targets of operators: each is a benchmark at one shape and dtype.

The right results are those of the operator's reference backend, given the same numbers in float64:
the equations of `msf_kernels/<family>/reference.py`, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from msf_kernels.examples import Shape

from . import fingerprint
from .arms import Arm, backends
from .gate import Expected, Tolerance, poison
from .registry import Benchmark, Drawn, draw, find, in_float64, tensors
from .results import Row
from .subject import Target
from .timing import Call, Work, buffer_sets


@dataclass(frozen=True)
class OperatorCall:
    """An OperatorCall is a forward, or a backward whose forward is not timed.

    Args:
        generator: draws the inputs, on its device.
        sets: how many calls are prepared, each on inputs of its own; by default more than fit into
            the caches.
    """

    benchmark: Benchmark
    shape: Shape
    dtype: torch.dtype
    generator: torch.Generator
    sets: int | None = None
    whole = False

    @cached_property
    def case(self) -> Drawn:
        """Return the inputs that results are checked on."""
        return self.draw()

    @cached_property
    def cases(self) -> list[Drawn]:
        """Return the inputs that calls are timed on."""
        sets = self.sets or buffer_sets(self.row.bytes, self.generator.device)
        return [self.draw() for _ in range(sets)]

    @property
    def options(self) -> dict[str, Any]:
        return self.benchmark.example.options(self.shape)

    def draw(self) -> Drawn:
        return draw(self.benchmark, self.shape, self.dtype, self.generator)

    @cached_property
    def row(self) -> Row:
        benchmark, args = self.benchmark, self.case.args
        return Row(
            op=benchmark.op,
            benchmark=benchmark.name,
            shape=self.shape,
            dtype=dtype_name(self.dtype),
            bytes=benchmark.bytes(*args, **self.options),
            flops=benchmark.flops(*args, **self.options),
            sizes=benchmark.sizes(self.shape),
        )

    def expected(self) -> list[Expected]:
        return self._expected

    @cached_property
    def _expected(self) -> list[Expected]:
        """Return the right results.

        Outputs have the dtype of the first argument, gradients that of their own argument.
        """
        args, count = self.case.args, self.benchmark.gradients
        (reference,) = (arm for arm in backends(self.benchmark.op) if arm.name == "reference")
        wide = in_float64(self.case, self.benchmark, self.shape)
        exact = [x for x in self._results(reference, wide) if x is not None]
        outputs = len(exact) - count
        names = [f"output {i}" for i in range(outputs)]
        names += [f"gradient {i}" for i in range(count)]
        like = [args[0]] * outputs + list(args[:count])
        return [Expected(name, tensor, arg.dtype) for name, tensor, arg in zip(names, exact, like)]

    def tolerance(self, arm: Arm) -> Tolerance:
        benchmark = self.benchmark
        roundings = benchmark.own_roundings if arm.ours else benchmark.roundings
        return Tolerance(roundings, benchmark.terms)

    def results(self, arm: Arm) -> tuple[Tensor | None, ...]:
        """Return the outputs and, where the backward is measured, the gradients."""
        with poison(self._expected):
            return self._results(arm, self.case)

    def work(self, arm: Arm) -> Work:
        """Prepare a forward for each case, or a backward, whose forward runs here."""

        def call(case: Drawn) -> Call:
            function = self.function(arm, case)
            if not self.benchmark.gradients:
                return partial(function, *case.args)
            return partial(gradients, tensors(function(*case.args)), self.benchmark, case)

        with scope_of(arm):
            return Work([call(case) for case in self.cases], partial(scope_of, arm))

    def function(self, arm: Arm, case: Drawn) -> Callable[..., Any]:
        """Return what the arm calls on the inputs. Our calls already hold the options."""
        prepared = arm.prepare(case.call)
        return prepared if arm.ours else partial(prepared, **self.options)

    def _results(self, arm: Arm, case: Drawn) -> tuple[Tensor | None, ...]:
        with scope_of(arm):
            outputs = tensors(self.function(arm, case)(*case.args))
            grads = gradients(outputs, self.benchmark, case) if self.benchmark.gradients else ()
        return *(output.detach() for output in outputs), *grads


@contextmanager
def scope_of(arm: Arm) -> Iterator[None]:
    # A compiled backward that is called again must not overwrite what the forward saved.
    with torch._functorch.config.patch(donated_buffer=False), arm.scope():
        yield


def gradients(
    outputs: Sequence[Tensor], benchmark: Benchmark, case: Drawn
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the first arguments; None for one that no output depends on.

    The graph is kept, so that the backward can be called again without its forward.
    """
    inputs = case.args[: benchmark.gradients]
    return torch.autograd.grad(
        outputs, inputs, case.cotangents, retain_graph=True, allow_unused=True
    )


def targets(generator: torch.Generator) -> Iterator[Target]:
    """Yield the targets of every operator, at the shapes that suit the device."""
    for benchmark in find():
        for place, shape in enumerate(benchmark.shapes_for(generator.device)):
            for dtype in benchmark.dtypes:
                yield Target(
                    op=benchmark.op,
                    family=fingerprint.family_of(benchmark.op),
                    benchmark=benchmark.name,
                    shape=shape,
                    dtype=dtype_name(dtype),
                    place=place,
                    arms=benchmark.arms,
                    fingerprint=partial(_fingerprint, benchmark.op),
                    draw=partial(OperatorCall, benchmark, shape, dtype, generator),
                )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fingerprint(op: str, arm: Arm) -> str | None:
    return fingerprint.of_operator(op, arm.name) if arm.ours else None
