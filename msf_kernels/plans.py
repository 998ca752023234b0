"""What was found out about one call is kept as a plan for others of its signature.

A signature is all that checks, the choice of a backend and launches follow from: the types of the
arguments, the values of those that are no tensors, shapes, strides, dtypes and devices of those
that are, whether they require gradients, and what decides on backends. Where tensors lie and what
they hold is no part of it, nor is a float that stands for a tensor. A call of a known signature
only looks its plan up, makes its outputs and launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from . import dispatch, recording
from .cuda_support import extension

PLAIN = (Tensor, torch.nn.Parameter)
OPTIONS = (bool, int, float, str)

# Sizes or options that change at every call shall neither fill the memory nor be searched for long.
MAX_KEYS, MAX_PLANS_OF_KEY = 1024, 8

_is_nested = attrgetter("is_nested")

Arguments = tuple[Any, ...]
Pick = Callable[[Arguments], Arguments]


def as_tensors(args: Arguments, numbers: Sequence[int]) -> Arguments:
    """Return the arguments with float64 tensors on the CPU for numbers at the places `numbers`."""
    if not numbers:
        return args
    # torch.compile keeps a product symbolic; with torch.tensor(value) it recompiles at each new
    # value until it gives up.
    return tuple(
        torch.ones((), dtype=torch.float64, device="cpu") * arg
        if place in numbers and not isinstance(arg, Tensor)
        else arg
        for place, arg in enumerate(args)
    )


class Plan:
    """A plan runs an operator for calls of one signature.

    Its first call chooses a backend. Kernels of ours are recorded in the second and replayed from
    the third on, so that a signature that comes once costs no recording.
    """

    def __init__(
        self, plans: Plans, requested: str, tensors_of: Pick, differentiable: bool
    ) -> None:
        self.op, self.numbers = plans.op, plans.numbers
        self.requested = dispatch.Request.parse(requested).backend_of(plans.op)
        self.tensors_of = tensors_of
        self.differentiable = differentiable
        self.run: Callable[..., Any] = self._choose

    def _choose(self, *args: Any) -> Any:
        chosen, result = self._run_requested(as_tensors(args, self.numbers))
        if chosen is not None:
            self.chosen = chosen.runner(self.differentiable)
            self.run = self._record if chosen.recordable else self._run
        return result

    def _record(self, *args: Any) -> Any:
        given = as_tensors(args, self.numbers)
        numbers = {place: given[place] for place in self.numbers if given[place] is not args[place]}
        with recording.Recording(self.tensors_of(args), numbers) as recorded:
            result = self._run(*given)
        self.run = recorded.replay(result, self.tensors_of, self._run) or self._run
        return result

    def _run(self, *args: Any) -> Any:
        args = as_tensors(args, self.numbers)
        try:
            return self.chosen(*args)
        except dispatch.CompilationFailed:  # for addresses like these
            return self._run_requested(args)[1]

    def _run_requested(self, args: Arguments) -> tuple[dispatch.Implementation | None, Any]:
        device = self.tensors_of(args)[0].device
        return dispatch.run_requested(self.op, self.requested, device, args, self.differentiable)


class Form:
    """A form is a tuple of types of arguments, with the plans for such calls."""

    def __init__(self, types: tuple[type, ...], numbers: Sequence[int]) -> None:
        tensors = [place for place, kind in enumerate(types) if kind in PLAIN]
        others = [
            place
            for place, kind in enumerate(types)
            if kind not in (*PLAIN, type(None))
            and not (place in numbers and issubclass(kind, float))
        ]
        self.tensors_of, self.options_of = _picker(tensors), _picker(others)
        self.has_plans = all(types[place] in OPTIONS for place in others)
        self.plans: dict[Arguments, list[tuple[Callable[..., bool], Plan]]] = {}

    def key(self, args: Arguments, tensors: Arguments) -> Arguments:
        """Return what of a signature plans are looked up by; TensorGuards compare the rest."""
        options = self.options_of(args)
        if 0.0 in options:  # two zeros are equal and differ in sign
            options = tuple(map(repr, options))
        return (
            dispatch._requested,
            dispatch.generation,
            extension.emulation,
            torch.is_grad_enabled(),
            tensors[0].shape,
            options,
        )

    def keep(self, key: Arguments, tensors: Arguments, plan: Plan) -> None:
        if len(self.plans) >= MAX_KEYS:
            self.plans.clear()
        plans = self.plans.setdefault(key, [])
        sizes: list[Any] = [list(x.shape) for x in tensors]
        strides: list[Any] = [list(x.stride()) for x in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        if guards.check(*tensors):  # not where one tensor is two arguments
            plans.insert(0, (guards.check, plan))
            del plans[MAX_PLANS_OF_KEY:]


class Plans:
    """The plans of an operator that takes numbers for tensors at the places `numbers`."""

    def __init__(self, op: str, numbers: Sequence[int]) -> None:
        self.op = op
        self.numbers = numbers
        self.forms: dict[tuple[type, ...], Form] = {}

    def find(self, args: Arguments) -> Plan | None:
        """Return the plan for a call, None where there is none yet."""
        form = self.forms.get(tuple(map(type, args)))
        if form is None:
            return None
        tensors = form.tensors_of(args)
        if True in map(_is_nested, tensors):  # and have neither shape nor strides
            return None
        for fits, plan in form.plans.get(form.key(args, tensors), ()):
            if fits(*tensors):
                return plan
        return None

    def make(self, args: Arguments, differentiable: bool) -> Plan:
        """Return a new plan for a call whose arguments were checked.

        It is kept at once: until a backend has run it, it chooses, and says so where none can.
        """
        types = tuple(map(type, args))
        form = self.forms.get(types) or Form(types, self.numbers)
        tensors = form.tensors_of(args)
        requested, *_ = key = form.key(args, tensors)
        plan = Plan(self, requested, form.tensors_of, differentiable)
        if form.has_plans:
            self.forms[types] = form
            form.keep(key, tensors, plan)
        return plan


def _picker(places: list[int]) -> Pick:
    """Return a function that picks these places of a tuple, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))
