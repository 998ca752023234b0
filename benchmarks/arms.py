"""The arms: our implementations, and what a user could call instead."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

import msf_kernels
from msf_kernels.dispatch import BACKENDS

Function = Callable[..., Any]


def _as_it_is(function: Function) -> Function:
    return function


def _supported(_: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Arm:
    """An arm is one implementation that is compared.

    Args:
        name: tells it from the arms that it is compared with.
        ours: whether it runs our operators. Other arms are peers.
        prepare: takes our function, a public operator or a module's forward, and returns what is
            called in its place.
        scope: makes a context to run and to compile that in.
        makes_graphs: whether it captures CUDA graphs, which cannot be captured inside another one.
        unsupported_reason: returns why the arm cannot run on a device, None where it can.
    """

    name: str
    ours: bool = False
    prepare: Callable[[Function], Function] = _as_it_is
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    makes_graphs: bool = False
    unsupported_reason: Callable[[torch.device], str | None] = _supported


def peer(
    name: str,
    function: Function,
    unsupported_reason: Callable[[torch.device], str | None] = _supported,
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Arm:
    """Return the arm that calls this function in place of ours."""
    return Arm(name, prepare=lambda _: function, scope=scope, unsupported_reason=unsupported_reason)


def backends(op: str) -> list[Arm]:
    """Return our arms of an operator: the reference, our kernels, then other libraries' kernels."""
    names = [*reversed(BACKENDS), *msf_kernels.backends_of(op)]
    return [
        Arm(
            name,
            ours=True,
            scope=partial(msf_kernels.backend, name if name in BACKENDS else f"auto,{op}={name}"),
            unsupported_reason=partial(_backend_unsupported_reason, op, name),
        )
        for name in dict.fromkeys(names)
    ]


def _backend_unsupported_reason(op: str, name: str, device: torch.device) -> str | None:
    if device.type == "cpu" and name in BACKENDS and name != "reference":
        return "without a GPU it is only emulated"
    return msf_kernels.explain_choice(op, device).unsupported_reasons[name]


def needs_gpu(device: torch.device, package: str | None = None) -> str | None:
    """Return why a peer that needs a GPU, and perhaps a package, cannot run; None where it can."""
    if device.type != "cuda":
        return "it needs a GPU"
    try:
        if package:
            importlib.import_module(package)
    except ImportError as error:
        return str(error)
    return None


def compiled(function: Function, **options: Any) -> Function:
    """Return the function as torch.compile makes it, at its first call: the import takes seconds.

    Shapes are declared static, because a second shape would else be compiled as a dynamic one.
    """
    compile = partial(torch.compile, function, dynamic=False, fullgraph=True)
    make = cache(partial(compile, options=options or None))
    return lambda *args, **options: make()(*args, **options)
