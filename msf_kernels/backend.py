"""Which implementation of an operator runs, and why.

Every operator has a `reference`; `cuda` and `triton` kernels register themselves beside it. The
choice is made at each call, below the dispatcher, so compiled graphs and gradients follow it too.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

BACKENDS = ("cuda", "triton", "reference")  # the automatic order on a GPU nobody measured


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run; the message says why."""


def _no_objection(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator. Both predicates return None for yes, the reason for no."""

    run: Callable[..., Any]
    available: Callable[[], str | None] = _no_objection  # on this machine?
    can_run: Callable[..., str | None] = _no_objection  # with these arguments?


_registry: dict[str, dict[str, Implementation]] = {}

# One value for the whole process, not a ContextVar: autograd runs backward in threads of its own.
_requested = os.environ.get("MSF_BACKEND", "auto")


def register(op: str, name: str, implementation: Implementation) -> None:
    """Offer `implementation` as the backend `name` of operator `op`."""
    _registry.setdefault(op, {})[_known_backend(name)] = implementation


def run(op: str, automatic: Sequence[str], *args: Any) -> Any:
    """Run operator `op` on the requested backend, or on the first of `automatic` that can."""
    if _requested == "auto":
        return _choose(op, automatic, args).run(*args)
    reason = _objection(op, _known_backend(_requested), args)
    if reason:
        raise BackendUnavailable(f"{op}: backend {_requested} cannot run: {reason}")
    return _registry[op][_requested].run(*args)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run operators on backend `name` ("auto", "cuda", "triton" or "reference") inside the block.

    The setting holds for the whole process. A backward pass follows the setting at the time it
    runs, so keep it inside the block as well.

    Raises:
        ValueError: no such backend. BackendUnavailable (a RuntimeError) comes from the operator
            that cannot run on it.
    """
    global _requested
    previous, _requested = _requested, name if name == "auto" else _known_backend(name)
    try:
        yield
    finally:
        _requested = previous


def explain_backends(op: str) -> dict[str, str | None]:
    """For each backend None where it can run operator `op` on this machine, else the reason."""
    backends_of(op)  # says so where there is no such operator
    return {name: _unavailable(op, name) for name in BACKENDS}


def backends_of(op: str) -> tuple[str, ...]:
    """The backends that have an implementation of operator `op`, on whatever machine."""
    if op not in _registry:
        raise ValueError(f"unknown operator {op!r}: known are {', '.join(sorted(_registry))}")
    return tuple(name for name in BACKENDS if name in _registry[op])


def available_backends(op: str) -> tuple[str, ...]:
    """The backends that can run operator `op` on this machine, in automatic order."""
    return tuple(name for name, reason in explain_backends(op).items() if reason is None)


def _choose(op: str, automatic: Sequence[str], args: Sequence[Any]) -> Implementation:
    for name in automatic:
        reason = _objection(op, name, args)
        if reason is None:
            return _registry[op][name]
        _log_once(f"{op}: not on {name}: {reason}")
    raise BackendUnavailable(f"{op}: no backend can run")


def _objection(op: str, name: str, args: Sequence[Any]) -> str | None:
    return _unavailable(op, name) or _registry[op][name].can_run(*args)


def _unavailable(op: str, name: str) -> str | None:
    implementation = _registry[op].get(name)
    if implementation is None:
        return f"{op} has no {name} kernel in this version"
    return implementation.available()


def _known_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose auto, {', '.join(BACKENDS)}")
    return name


@functools.lru_cache(maxsize=1024)
def _log_once(message: str) -> None:
    log.info(message)
