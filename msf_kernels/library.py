"""Registers operators with PyTorch: schema, implementations, fake and gradient, once for all.

A fake and a gradient belong to the operator and not to a backend, so torch.compile and autograd
see one operator whichever kernel runs. Operators are functional: every output is a new tensor,
never an input or a view of one, contiguous or channels-last as the first tensor that came in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import dispatch, extension, measurements, triton_support
from .layout import conform

NAMESPACE = "msf"

# Whether the kernels of a backend can run on a device.
SUPPORT = {"cuda": extension, "triton": triton_support}
_library = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernels: Sequence[str] = (),
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    sizes: Callable[..., measurements.Sizes] | None = None,
) -> Callable[..., Any]:
    """Define the operator `msf::<schema>` and return its callable.

    Args:
        schema: `name(arguments) -> results` in the schema language of torch.library.
        reference: the equation in plain PyTorch; takes the arguments by position.
        fake: the same signature; returns empty tensors of the right shapes and dtypes.
        kernels: the backends besides the reference. Each is a module of that name beside the
            reference's, imported at its first call, with a function of the operator's name and,
            if it cannot take all arguments, `can_run(*args)`: None or the reason.
        sizes: the same signature; returns what it depends on which backend is fastest.
        backward, setup_context: as in torch.library.register_autograd. Absent gradients arrive as
            None. An operator without them cannot be differentiated and says so.
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    implementation = dispatch.Implementation(partial(_run_reference, reference))
    dispatch.register(name, "reference", implementation)
    package = reference.__module__.rpartition(".")[0]
    for kernel in kernels:
        module, support = f"{package}.{kernel}", SUPPORT[kernel]
        run, can_run = partial(_run_kernel, module, name), partial(_can_run, module)
        dispatch.register(name, kernel, dispatch.Implementation(run, support.available, can_run))
    if sizes:
        dispatch.register_sizes(name, sizes)
    _library.impl(name, partial(_run_on_cpu, name), "CPU")
    _library.impl(name, partial(_run_on_gpu, name), "CUDA")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def no_gradient(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{qualified} has no derivative")

    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(
        qualified, backward or no_gradient, setup_context=setup, lib=_library
    )
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _run_on_cpu(name: str, *args: Any) -> Any:
    return dispatch.run(name, torch.device("cpu"), *args)


def _run_on_gpu(name: str, *args: Any) -> Any:
    device = next(arg.device for arg in args if isinstance(arg, Tensor) and arg.is_cuda)
    return dispatch.run(name, device, *args)


def _run_kernel(module: str, name: str, *args: Any) -> Any:
    return getattr(importlib.import_module(module), name)(*args)


def _can_run(module: str, *args: Any) -> str | None:
    limits = getattr(importlib.import_module(module), "can_run", None)
    return limits(*args) if limits else None


def _run_reference(reference: Callable[..., Any], *args: Any) -> Any:
    """The reference as an operator: its own precision under autocast, its outputs laid out."""
    device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    with torch.autocast(device, enabled=False):
        result = reference(*args)
    if isinstance(result, Tensor):
        return conform((result,), args)[0]
    return conform(result, args)
