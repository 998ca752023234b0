"""What a user could call instead of our operators."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch


def _supported(_: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """One implementation of a benchmark's call that is not ours.

    Args:
        name: of its arm, none of a backend's.
        function: takes the benchmark's arguments.
        unsupported_reason: device -> None where it can run there, else the reason.
        scope: holds while the function runs.
    """

    name: str
    function: Callable[..., Any]
    unsupported_reason: Callable[[torch.device], str | None] = _supported
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext


def needs_gpu(device: torch.device, package: str | None = None) -> str | None:
    """The reason why a peer that runs on GPUs only, and with this package, cannot run here."""
    if device.type != "cuda":
        return "it needs a GPU"
    try:
        if package:
            importlib.import_module(package)
    except ImportError as error:
        return str(error)
    return None


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile of it at the first call, as the compiler alone takes seconds to import.

    Static shapes, as one shape after the other would make the second compilation dynamic.
    """
    compile = partial(torch.compile, function, dynamic=False, fullgraph=True)
    make = cache(partial(compile, options=options or None))
    return lambda *args: make()(*args)
