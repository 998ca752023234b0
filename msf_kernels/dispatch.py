"""The choice of the implementation that runs an operator, and the reasons for it.

Every operator has a `reference`; `cuda` and `triton` kernels register themselves beside it, and so
does, for some operators, what other libraries offer. The choice is made at each call, below the
dispatcher, so compiled graphs and gradients follow it too.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import measurements

log = logging.getLogger(__name__)

# The backends that have kernels of this package. On a GPU that nobody measured they are tried in
# this order, with those of other libraries before the reference.
BACKENDS = ("cuda", "triton", "reference")


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run; the message says why."""


def _supported(*_: Any) -> None:
    return None


class CompilationFailed(BackendUnavailable):
    """A kernel was not compiled at its first call. Automatic choice goes on to the next backend."""


@dataclass(frozen=True)
class Implementation:
    """An Implementation is one way to run an operator.

    Args:
        run: takes the operator's arguments by position.
        unsupported_device_reason: takes a device; returns None or why its tensors cannot be taken.
        unsupported_args_reason: takes what `run` takes; returns None or why it cannot be taken.
        lasting: whether these reasons follow from the signature of the arguments (`plans.py`), and
            from no setting that may change.
        recordable: whether what `run` launches follows from it too, by the `launch` of
            its support.
        run_without_gradient: runs calls that need no gradient, and returns None for results that
            only a gradient reads; absent where `run` does both.
    """

    run: Callable[..., Any]
    unsupported_device_reason: Callable[[torch.device], str | None] = _supported
    unsupported_args_reason: Callable[..., str | None] = _supported
    lasting: bool = False
    recordable: bool = False
    run_without_gradient: Callable[..., Any] | None = None

    def runner(self, differentiable: bool) -> Callable[..., Any]:
        """Return what runs calls with a gradient to come, or without."""
        return self.run if differentiable else self.run_without_gradient or self.run


@dataclass(frozen=True)
class Request:
    """A request names what calls shall run on: a backend, or "auto" for the first that can.

    Args:
        default: what operators run on that have no request of their own.
        operators: {operator: what it runs on}; the gradient of an operator follows it.
    """

    default: str
    operators: Mapping[str, str]

    @classmethod
    @functools.lru_cache
    def parse(cls, text: str) -> Request:
        """Read a request such as "triton,attention=cudnn"."""
        default, operators = "auto", dict[str, str]()
        for item in text.split(","):
            op, _, name = (part.strip() for part in item.rpartition("="))
            if op:
                backends_of(op)  # says so where there is no such operator
                if op.endswith("_backward"):
                    raise ValueError(
                        f"choose for {op.removesuffix('_backward')}: its gradient follows"
                    )
            choices = ("auto", *(_all(op) if op else BACKENDS))
            if name not in choices:
                where = f" of {op}" if op else ""
                raise ValueError(f"unknown backend {name!r}{where}: choose {', '.join(choices)}")
            if op:
                operators[op] = name
            else:
                default, operators = name, {}
        return cls(default, operators)

    def backend_of(self, op: str) -> str:
        """Return what calls of operator `op` shall run on."""
        return self.operators.get(op.removesuffix("_backward"), self.default)


@dataclass(frozen=True)
class Choice:
    """A choice tells which backend calls of an operator take on a device, and why not the others.

    The arguments of a call may still make a backend decline, or be of other sizes than those that
    were measured first.

    Args:
        device: the device of the tensors.
        requested: the backend that was asked for, or "auto".
        unsupported_reasons: for each backend, in the order in which they are tried, None where it
            takes tensors of the device, else the reason.
    """

    device: torch.device
    requested: str
    unsupported_reasons: dict[str, str | None]

    @property
    def available(self) -> tuple[str, ...]:
        """Return the backends that take the device's tensors, in the order they are tried in."""
        return tuple(name for name, reason in self.unsupported_reasons.items() if reason is None)

    @property
    def backend(self) -> str | None:
        """Return the backend that calls take, None where the requested one cannot run."""
        if self.requested == "auto":
            return self.available[0]
        return self.requested if self.requested in self.available else None

    @property
    def other_reasons(self) -> dict[str, str]:
        """Return for each of the other backends why calls do not take it."""
        if self.requested != "auto":
            reason = f"{self.requested} was asked for"
        elif self.device.type == "cpu":
            reason = "tensors on the CPU take the reference unless asked by name"
        else:
            reason = f"{self.backend} comes first"
        others = self.unsupported_reasons.items()
        return {name: found or reason for name, found in others if name != self.backend}


_registry: dict[str, dict[str, Implementation]] = {}
_failed: dict[tuple[str, str], str] = {}  # operator and backend, and what the compiler said
_sizes: dict[str, Callable[..., measurements.Sizes]] = {}

# Counts what changes choices besides the request: plans of an earlier generation are not used.
generation = 0

# One value for the whole process, not a ContextVar: autograd runs backward in threads of its own.
_requested = os.environ.get("MSF_BACKEND") or "auto"

# It is the last of these: what was asked for outside of all blocks of `backend`, and in each.
_requests: dict[object, str] = {None: _requested}
_change = threading.Lock()


def register(op: str, name: str, implementation: Implementation) -> None:
    """Offer `implementation` as the backend `name` of operator `op`."""
    global generation
    _registry.setdefault(op, {})[name] = implementation
    generation += 1


def register_sizes(op: str, sizes: Callable[..., measurements.Sizes]) -> None:
    """Let `sizes(*args)` decide which backend of operator `op` is fastest."""
    _sizes[op] = sizes


def run(op: str, device: torch.device, *args: Any) -> Any:
    """Run operator `op` on the requested backend, or on the first in automatic order that can."""
    return run_requested(op, Request.parse(_requested).backend_of(op), device, args)[1]


def run_requested(
    op: str, requested: str, device: torch.device, args: Sequence[Any], differentiable: bool = True
) -> tuple[Implementation | None, Any]:
    """Run operator `op` on backend `requested`, or on the first in automatic order for "auto".

    Return the implementation that calls like this one take from here on, None where that may
    change with some setting, and the result.
    """
    if requested == "auto":
        return _run_first(op, device, args, differentiable)
    reason = _unsupported_reason(op, requested, device, args)
    if reason:
        raise BackendUnavailable(f"{op}: backend {requested} cannot run: {reason}")
    implementation = _registry[op][requested]
    result = implementation.runner(differentiable)(*args)
    return (implementation if implementation.lasting else None), result


@contextmanager
def backend(name: str | None = None, **operators: str) -> Iterator[None]:
    """Run operators on backend `name` ("auto", "cuda", "triton" or "reference") inside the block.

    Keywords choose for one operator and its gradient: `backend("triton", attention="cudnn")`;
    `backends_of` lists what it has. Without a name the others stay as they are. MSF_BACKEND in the
    environment, and `name` too, take all at once: "triton,attention=cudnn".

    The setting holds for the whole process: where threads have blocks of their own, it is that of
    the last one begun and not ended. A backward pass follows the setting at the time it runs, so
    keep it inside the block as well.

    Raises:
        ValueError: no such backend, or no such operator. BackendUnavailable (a RuntimeError) comes
            from the operator that cannot run on it.
    """
    global _requested
    choices = [f"{op}={choice}" for op, choice in operators.items()]
    request = ",".join([_requested if name is None else str(name), *choices])
    Request.parse(request)
    block = object()
    with _change:
        _requests[block] = _requested = request
    try:
        yield
    finally:
        with _change:
            del _requests[block]
            *_, _requested = _requests.values()


def automatic_order(
    op: str, device: torch.device, sizes: measurements.Sizes = ()
) -> tuple[str, ...]:
    """Return the backends that calls with tensors of this device try unless asked for one.

    On a CPU that is the reference alone. On a GPU the fastest comes first where it was measured,
    by default at the first sizes that were.
    """
    if device.type == "cpu":
        return ("reference",)
    return tuple(dict.fromkeys((*measurements.fastest(op, device, sizes), *_all(op))))


def explain_choice(op: str, device: torch.device | str | None = None) -> Choice:
    """Tell which backend calls of operator `op` take on the device, and why not the others.

    `device` is this machine's GPU by default, its CPU where there is none.

    Raises:
        ValueError: there is no such operator, or no such device here.
    """
    requested = requested_backend(op)
    found = _device(device)
    names = dict.fromkeys((*automatic_order(op, found), *_all(op)))
    reasons = {name: _unsupported_device_reason(op, name, found) for name in names}
    return Choice(found, requested, reasons)


def backends_of(op: str) -> tuple[str, ...]:
    """Return the backends that have an implementation of operator `op`, on whatever machine."""
    if not isinstance(op, str) or op not in _registry:
        raise ValueError(f"unknown operator {op!r}: known are {', '.join(sorted(_registry))}")
    return tuple(name for name in _all(op) if name in _registry[op])


def available_backends(op: str, device: torch.device | str | None = None) -> tuple[str, ...]:
    """Return the backends that take tensors of the device, in the order in which they are tried."""
    return explain_choice(op, device).available


def chosen_backend(op: str, device: torch.device | str | None = None) -> str | None:
    """Return the backend that calls of operator `op` take on the device, None where none runs."""
    return explain_choice(op, device).backend


def requested_backend(op: str) -> str:
    """Return what calls of operator `op` are asked to run on: a backend's name, or "auto"."""
    backends_of(op)  # says so where there is no such operator
    return Request.parse(_requested).backend_of(op)


def _run_first(
    op: str, device: torch.device, args: Sequence[Any], differentiable: bool
) -> tuple[Implementation | None, Any]:
    """Run on the first backend in automatic order that can, or whose kernels compile."""
    global generation
    sizes = _sizes[op](*args) if op in _sizes else ()
    lasting = True
    for name in automatic_order(op, device, sizes):
        reason = _unsupported_reason(op, name, device, args)
        implementation = _registry[op].get(name)
        lasting = lasting and (implementation is None or implementation.lasting)
        if implementation is not None and reason is None:
            try:
                result = implementation.runner(differentiable)(*args)
                return (implementation if lasting else None), result
            except CompilationFailed as error:
                reason = _failed[op, name] = str(error)
                generation += 1
                log.warning("%s: not on %s from here on: %s", op, name, reason)
        _log_once(f"{op}: not on {name}: {reason}")
    raise BackendUnavailable(f"{op}: no backend can run")


def _unsupported_reason(
    op: str, name: str, device: torch.device, args: Sequence[Any]
) -> str | None:
    reason = _unsupported_device_reason(op, name, device)
    return reason or _registry[op][name].unsupported_args_reason(*args)


def _unsupported_device_reason(op: str, name: str, device: torch.device) -> str | None:
    implementation = _registry[op].get(name)
    if implementation is None:
        return f"{op} has no {name} kernel in this version"
    if (op, name) in _failed:
        return _failed[op, name]
    return implementation.unsupported_device_reason(device)


def _all(op: str) -> tuple[str, ...]:
    """Return our backends, with or without kernels for the operator, and those of libraries."""
    *kernels, reference = BACKENDS
    return *kernels, *(name for name in _registry[op] if name not in BACKENDS), reference


def _device(device: Any) -> torch.device:
    """Return the device meant, by default this machine's GPU, its CPU where there is none. Raise
    ValueError where it is none, or not here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    try:
        found = torch.device(device)
    except (TypeError, RuntimeError):  # of what names no device
        found = None
    is_gpu = found is not None and found.type == "cuda" and (found.index or 0) < gpus
    if found is None or not (found.type == "cpu" or is_gpu):
        raise ValueError(f"no device {device} here: choose cpu" + (" or cuda" if gpus else ""))
    return found


@functools.lru_cache(maxsize=1024)
def _log_once(message: str) -> None:
    log.info(message)
