"""The registration of operators with PyTorch: schema, implementations, fake and gradient.

A fake and a gradient belong to the operator and not to a backend, so torch.compile and autograd
see one operator whichever kernel runs. In forward mode and inside the transforms of `torch.func`
(jvp, grad, vmap and others) the reference runs, which PyTorch differentiates and vectorises: also
where a graph, exported or compiled before, calls the operator.
Operators are functional: every output is a new tensor, never an input or a view of one, contiguous
or channels-last as the first tensor that came in.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from . import cuda_support, dispatch, measurements, triton_support
from .layout import conform
from .plans import PLAIN, Plans, as_tensors

NAMESPACE = "msf"

# These modules tell whether the kernels of a backend can run on a device.
SUPPORT = {"cuda": cuda_support, "triton": triton_support}
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
    check: Callable[..., None] = lambda op, **arguments: None,
    numbers: Sequence[str] = (),
    for_gradient: bool = False,
) -> Callable[..., Any]:
    """Define the operator `msf::<schema>` and return its callable.

    Args:
        schema: `name(arguments) -> results` in the schema language of torch.library.
        reference: the equation in plain PyTorch; takes all arguments, in the schema's order.
        fake: returns empty tensors of the right shapes and dtypes.
        kernels: the backends besides the reference. Each is a module of that name beside the
            reference's, imported at its first call, with a function of the operator's name that
            takes what the reference takes. Where the module has an `unsupported_reason`, that
            returns None or why the kernels cannot take the arguments.
        sizes: returns the sizes on which the fastest backend depends.
        backward: takes the context and the gradients of the outputs; an absent one is None, but
            never all. Returns {argument: its gradient}. An operator without it cannot be
            differentiated and says so.
        setup_context: as in torch.library.register_autograd.
        check: takes the operator's name and, by theirs, all arguments; raises one line where they
            are wrong. That has to follow from their signature (`plans.py`), of which one call alone
            is checked.
        numbers: the arguments, tensors in the schema, that may come as numbers too. Kernels and
            graphs get those as float64 tensors on the CPU. Floats are no part of a signature.
        for_gradient: whether only the gradient reads some of the results. In a call without one
            kernels get `for_gradient=False`, and return None for them.

    `fake`, `sizes` and `unsupported_reason` have as parameters, by name, only those arguments of
    the operator that they look at (`by_name`).
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    arguments = arguments_of(name)
    places = tuple(map(arguments.index, numbers))

    implementation = dispatch.Implementation(partial(_run_reference, reference), lasting=True)
    dispatch.register(name, "reference", implementation)
    package = reference.__module__.rpartition(".")[0]
    for kernel in kernels:
        module, support = f"{package}.{kernel}", SUPPORT[kernel]
        run = partial(_run_kernel, module, name)
        implementation = dispatch.Implementation(
            run,
            support.unsupported_reason,
            partial(_unsupported_reason, module, name),
            lasting=True,
            recordable=True,
            run_without_gradient=partial(run, for_gradient=False) if for_gradient else None,
        )
        dispatch.register(name, kernel, implementation)
    if sizes:
        dispatch.register_sizes(name, by_name(name, sizes))
    _library.impl(name, partial(_run, name), "CPU")
    _library.impl(name, partial(_run, name), "CUDA")
    in_plain_pytorch = partial(_run_reference, reference)
    _library.impl(name, in_plain_pytorch, "FuncTorchDynamicLayerFrontMode")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if backward is None:
            raise NotImplementedError(
                f"{qualified} has no derivative; torch.func.hessian has second ones"
            )
        found = {} if all(grad is None for grad in grads) else backward(ctx, *grads)
        ordered = tuple(found.pop(argument, None) for argument in arguments)
        assert not found, f"{qualified} has no argument {', '.join(found)}"
        return ordered

    torch.library.register_fake(qualified, by_name(name, fake), lib=_library)
    differentiated = make_autograd_impl(_operator(name), Info(gradients, setup))

    @torch._disable_dynamo  # a graph would take what it is traced with, which has no tangent
    def in_forward_mode(keys: Any, *args: Any) -> Any:
        return (
            in_plain_pytorch(*args) if any(map(_has_tangent, args)) else differentiated(keys, *args)
        )

    def autograd(keys: Any, *args: Any) -> Any:
        # All that `torch.library.register_autograd` registers is the latter: it loses tangents.
        run = in_forward_mode if forward_ad._current_level >= 0 else differentiated
        return run(keys, *args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)
    operator = _operator(name)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, plan = args
            output = plan.run(*inputs)
            setup(ctx, as_tensors(tuple(inputs), places), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return *gradients(ctx, *grads), None

    plans = Plans(name, places)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            check(name, **dict(zip(arguments, args)))
            args = as_tensors(args, places)
            # A graph enters a level of forward mode by C++, which no Python sees when it runs.
            return in_plain_pytorch(*args) if _level_of_trace() >= 0 else operator(*args)
        watched = is_watched()
        plan = None if watched else plans.find(args)
        if plan is None:
            check(name, **dict(zip(arguments, args)))
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            if watched or not all(map(is_plain, tensors)):
                return operator(*as_tensors(args, places))
            wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            plan = plans.make(args, differentiable=wanted)
        # The same without the dispatcher, whose layers in Python take longer than all else.
        return Differentiated.apply(*args, plan) if plan.differentiable else plan.run(*args)

    return call


def arguments_of(name: str) -> tuple[str, ...]:
    """Return the names of an operator's arguments, in the order of its schema."""
    return tuple(argument.name for argument in _operator(name)._schema.arguments)


def by_name(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that takes all arguments of an operator and calls `function` with some.

    These are the arguments that `function` has as parameters. A parameter that the operator does
    not have keeps its default. The names are resolved here, so that a call only picks.
    """
    arguments = arguments_of(name)
    places = [
        (parameter, arguments.index(parameter))
        for parameter in inspect.signature(function).parameters
        if parameter in arguments
    ]
    return lambda *args: function(**{parameter: args[place] for parameter, place in places})


def _level_of_trace() -> int:
    return forward_ad._current_level


# As torch.compiler.assume_constant_result does, which imports the compiler.
_level_of_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_watched() -> bool:
    """Tell whether a mode, transform, trace or profiler has to see operators that are called."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def is_plain(x: Tensor) -> bool:
    """Tell whether the numbers of x can be read as they lie in memory, outside of a graph.

    Batched, fake and sparse tensors have dispatch keys that a fresh tensor has not; so has a view
    of negated numbers, such as the imaginary part of a conjugate, which nobody has negated yet.
    """
    keys = torch._C._dispatch_keys(x).raw_repr()
    return type(x) in PLAIN and keys in _plain_keys(x.device.type)


@cache
def _plain_keys(device: str) -> tuple[int, ...]:
    if device not in ("cpu", "cuda"):
        return ()
    with torch.inference_mode():
        tensors = [torch.empty(0, device=device)]
    with torch.inference_mode(False):
        tensors.append(torch.empty(0, device=device))
    return tuple(torch._C._dispatch_keys(x).raw_repr() for x in tensors)


_plain_keys("cpu")  # now, because a transform that is the first to ask wraps what it is asked for


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _operator(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _run(name: str, *args: Any) -> Any:
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    return dispatch.run(name, device, *args)


def _run_kernel(module: str, name: str, *args: Any, **options: bool) -> Any:
    return _kernel(module, name)(*args, **options)


@cache
def _kernel(module: str, name: str) -> Callable[..., Any]:
    kernel: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return kernel


def _unsupported_reason(module: str, name: str, *args: Any) -> str | None:
    reason_of = _limits(module, name)
    return reason_of(*args) if reason_of else None


@cache
def _limits(module: str, name: str) -> Callable[..., str | None] | None:
    """Return `unsupported_reason` of a module of kernels, by position; None if it has none."""
    reason_of = getattr(importlib.import_module(module), "unsupported_reason", None)
    return reason_of and by_name(name, reason_of)


def _run_reference(reference: Callable[..., Any], *args: Any) -> Any:
    """Run the reference as an operator: out of reach of autocast, with its outputs laid out."""
    device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    with torch.autocast(device, enabled=False):
        result = reference(*args)
    if isinstance(result, Tensor):
        return conform((result,), args)[0]
    return conform(result, args)
