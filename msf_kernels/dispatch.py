"""Which implementation of an operator runs, and why.

Every operator has a `reference`; `cuda` and `triton` kernels register themselves beside it, and so
does, for some operators, what other libraries offer. The choice is made at each call, below the
dispatcher, so compiled graphs and gradients follow it too.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import measurements

log = logging.getLogger(__name__)

# Ours. The automatic order on a GPU nobody measured is cuda, triton, what libraries an operator
# has, reference.
BACKENDS = ("cuda", "triton", "reference")


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run; the message says why."""


def _no_objection(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator. Both predicates return None for yes, the reason for no."""

    run: Callable[..., Any]
    available: Callable[[torch.device], str | None] = _no_objection  # for tensors of this device?
    can_run: Callable[..., str | None] = _no_objection  # with these arguments?


_registry: dict[str, dict[str, Implementation]] = {}
_sizes: dict[str, Callable[..., measurements.Sizes]] = {}

# One value for the whole process, not a ContextVar: autograd runs backward in threads of its own.
_requested = os.environ.get("MSF_BACKEND") or "auto"


def register(op: str, name: str, implementation: Implementation) -> None:
    """Offer `implementation` as the backend `name` of operator `op`."""
    _registry.setdefault(op, {})[name] = implementation


def register_sizes(op: str, sizes: Callable[..., measurements.Sizes]) -> None:
    """Let `sizes(*args)` decide which backend of operator `op` is fastest."""
    _sizes[op] = sizes


def run(op: str, device: torch.device, *args: Any) -> Any:
    """Run operator `op` on the requested backend, or on the first in automatic order that can."""
    name = requested_backend(op)
    if name == "auto":
        return _choose(op, device, args).run(*args)
    reason = _objection(op, name, device, args)
    if reason:
        raise BackendUnavailable(f"{op}: backend {name} cannot run: {reason}")
    return _registry[op][name].run(*args)


@contextmanager
def backend(name: str | None = None, **operators: str) -> Iterator[None]:
    """Run operators on backend `name` ("auto", "cuda", "triton" or "reference") inside the block.

    Keywords choose for one operator and its gradient: `backend("triton", attention="cudnn")`;
    `backends_of` lists what it has. Without a name the others stay as they are. MSF_BACKEND in the
    environment, and `name` too, take all at once: "triton,attention=cudnn".

    The setting holds for the whole process. A backward pass follows the setting at the time it
    runs, so keep it inside the block as well.

    Raises:
        ValueError: no such backend, or no such operator. BackendUnavailable (a RuntimeError) comes
            from the operator that cannot run on it.
    """
    global _requested
    choices = [f"{op}={choice}" for op, choice in operators.items()]
    request = ",".join([_requested if name is None else name, *choices])
    _parse(request)
    previous, _requested = _requested, request
    try:
        yield
    finally:
        _requested = previous


def automatic_order(op: str, device: torch.device, sizes: measurements.Sizes = ()) -> tuple[str, ...]:
    """The backends that calls with tensors of this device take unless asked, in that order.

    On a CPU the reference alone; on a GPU the fastest first where it was measured, by default at
    the first sizes that were.
    """
    if device.type == "cpu":
        return ("reference",)
    return tuple(dict.fromkeys((*measurements.fastest(op, device, sizes), *_all(op))))


def explain_backends(op: str, device: torch.device | str | None = None) -> dict[str, str | None]:
    """For each backend of operator `op` None where it takes tensors of the device, else the reason.

    They come in the order in which they are tried; `device` is this machine's GPU by default, its
    CPU where there is none. Arguments may still make a backend decline.

    Raises:
        ValueError: there is no such operator, or no such device here.
    """
    backends_of(op)  # says so where there is no such operator
    device = torch.device(device) if device else _default_device()
    if device.type != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"no device {device} here: choose cpu")
    names = dict.fromkeys((*automatic_order(op, device), *_all(op)))
    return {name: _unavailable(op, name, device) for name in names}


def backends_of(op: str) -> tuple[str, ...]:
    """The backends that have an implementation of operator `op`, on whatever machine."""
    if op not in _registry:
        raise ValueError(f"unknown operator {op!r}: known are {', '.join(sorted(_registry))}")
    return tuple(name for name in _all(op) if name in _registry[op])


def available_backends(op: str, device: torch.device | str | None = None) -> tuple[str, ...]:
    """The backends that take tensors of the device, as `explain_backends` orders them."""
    reasons = explain_backends(op, device)
    return tuple(name for name, reason in reasons.items() if reason is None)


def chosen_backend(op: str, device: torch.device | str | None = None) -> str | None:
    """What a call of operator `op` takes on the device, unless its arguments make that decline or
    are of other sizes than were measured first.

    None where a backend was asked for by name that cannot run.
    """
    available, name = available_backends(op, device), requested_backend(op)
    if name == "auto":
        return available[0]
    return name if name in available else None


def requested_backend(op: str) -> str:
    """What calls of operator `op` are asked to run on: a backend's name, or "auto"."""
    backends_of(op)  # says so where there is no such operator
    request = _parse(_requested)
    return request.get(op.removesuffix("_backward"), request[""])


def _choose(op: str, device: torch.device, args: Sequence[Any]) -> Implementation:
    sizes = _sizes[op](*args) if op in _sizes else ()
    for name in automatic_order(op, device, sizes):
        reason = _objection(op, name, device, args)
        if reason is None:
            return _registry[op][name]
        _log_once(f"{op}: not on {name}: {reason}")
    raise BackendUnavailable(f"{op}: no backend can run")


def _objection(op: str, name: str, device: torch.device, args: Sequence[Any]) -> str | None:
    return _unavailable(op, name, device) or _registry[op][name].can_run(*args)


def _unavailable(op: str, name: str, device: torch.device) -> str | None:
    implementation = _registry[op].get(name)
    if implementation is None:
        return f"{op} has no {name} kernel in this version"
    return implementation.available(device)


def _all(op: str) -> tuple[str, ...]:
    """Ours and the operator's libraries, whether or not ours have kernels of it."""
    *kernels, reference = BACKENDS
    return *kernels, *(name for name in _registry[op] if name not in BACKENDS), reference


@functools.lru_cache
def _parse(text: str) -> Mapping[str, str]:
    """A request such as "triton,attention=cudnn" by operator; under "" for those not named."""
    request = {"": "auto"}
    for item in text.split(","):
        op, _, name = (part.strip() for part in item.rpartition("="))
        if op:
            backends_of(op)  # says so where there is no such operator
            if op.endswith("_backward"):
                raise ValueError(f"choose for {op.removesuffix('_backward')}: its gradient follows")
        choices = ("auto", *(_all(op) if op else BACKENDS))
        if name not in choices:
            where = f" of {op}" if op else ""
            raise ValueError(f"unknown backend {name!r}{where}: choose {', '.join(choices)}")
        if not op:
            request = {}
        request[op] = name
    return request


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@functools.lru_cache(maxsize=1024)
def _log_once(message: str) -> None:
    log.info(message)
