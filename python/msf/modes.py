"""The modes of PyTorch inside code that must not depend on what its caller has set."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._guards import detect_fake_mode
from torch.overrides import TorchFunctionMode


@contextmanager
def default_device(device: torch.device | str = "cpu") -> Iterator[None]:
    """Run with ``device`` as the default, whatever the caller has."""
    device = torch.device(device)
    # Where it is that already, the mode would only slow every call of torch.
    with nullcontext() if torch.empty(0).device == device else device:
        yield


@contextmanager
def own_casts() -> Iterator[None]:
    """Run without the casts of weights that an autocast around us keeps, as weights may have
    changed since, and leave it none."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def own_modes() -> Iterator[None]:
    """Run with gradients, no autocast nor what one has cast, and float32 on the CPU as the default,
    whatever the caller has."""
    dtype = torch.get_default_dtype()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    with ExitStack() as stack:
        stack.enter_context(own_casts())
        stack.enter_context(default_device())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


class _Unfilled(TorchFunctionMode):
    """Skips nn.init.normal_, by which nn.Embedding fills its weight."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def no_memory() -> Iterator[None]:
    """Make modules whose tensors have no memory. They are not filled: on the meta device normal_
    would import PyTorch's compiler, which takes longer than all else that reads a model."""
    with torch.device("meta"), _Unfilled():
        yield


def has_values(x: Tensor) -> bool:
    """Return whether numbers of x can be looked at: not in a graph, nor without memory, nor where
    vmap runs one call for many."""
    if torch.compiler.is_compiling() or x.is_meta or detect_fake_mode() is not None:
        return False
    return not is_batched(x)


def is_batched(x: Tensor) -> bool:
    """Return whether vmap runs one call for many x, as far as that is known outside of a graph."""
    if torch.compiler.is_compiling():
        return False
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def outside() -> int:
    """Return the ``stacklevel``, for our caller's warning, of the code that called the model."""
    level, frame = 0, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("msf", "torch"):
        level, frame = level + 1, frame.f_back
    return level
