"""Compares what replays of Triton's launches start with what calls without a plan start."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

import msf_kernels
from benchmarks.host import HEADS, with_numbers
from benchmarks.no_gpu import no_triton
from kernels.fresh import Watching, tensors
from msf_kernels import dispatch
from msf_kernels.examples import Example, examples, families

COPIES = "attention bias-layer_norm-rope"  # PyTorch adds the bias of v, which is not replayed
FORMULAS = ("flow_interpolate", "guided_euler_step")  # PyTorch computes their gradients
runs: list[str] = []  # of Triton's own launch, with all its Python
launched: list[tuple[Any, ...]] = []


def launcher(source: Any, metadata: Any) -> Callable[..., None]:
    signature = tuple(source.signature.values())

    def launch(*args: Any) -> None:
        grid, (stream, function, _, _, *hooks) = args[:3], args[3:9]
        assert (stream, function) == (0, 1)
        for hook in hooks:
            if hook is not None:
                hook()
        launched.append((source.fn.__name__, metadata.hash, grid, *taken(signature, args[9:])))

    return launch


def taken(signature: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """What a kernel gets: addresses for tensors, nothing for what is constant in its code."""
    found: list[Any] = []
    for kind, arg in zip(signature, args, strict=True):
        if isinstance(kind, tuple):
            found += taken(kind, arg)
        elif kind != "constexpr":
            found.append(arg.data_ptr() if isinstance(arg, Tensor) else arg)
    return found


def started(call: Callable[[], Any], known: list[Any]) -> tuple[Any, list[Any], int]:
    """What a call returns, what it starts, and how much of that with Triton's Python.

    Addresses are told by the tensor that they lie in: a known one, or which of those that are made.
    """
    launched.clear()
    runs.clear()
    result = call()
    made: dict[int, str] = {}
    places = [x for x in known if isinstance(x, Tensor)]

    def told(arg: Any) -> Any:
        if not isinstance(arg, int) or arg < 2**32:
            return arg
        for place, x in enumerate(places):
            memory = x.untyped_storage()
            if memory.data_ptr() <= arg < memory.data_ptr() + memory.nbytes():
                return f"{place} + {arg - memory.data_ptr()}"
        return made.setdefault(arg, f"made {len(made)}")

    return result, [tuple(map(told, launch)) for launch in launched], len(runs)


def new(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(size).to(dtype)


def draw(example: Example) -> tuple[Callable[..., Any], list[Any]]:
    """A call and its arguments, with numbers for tensors that stand for one."""
    call, inputs = example.draw(new, HEADS.get(example.op, example.shape))
    for tensor in inputs[: example.gradients]:
        tensor.requires_grad_()
    return call, [*with_numbers(inputs)]


def check(example: Example) -> None:
    """That the first call and the second, which is recorded, run Triton's Python, and others do
    not; and that all start the same."""
    dispatch.generation += 1  # no plan of another example holds
    for attempt in range(3):
        by_python = attempt < 2
        where = f"{example.name}, call {attempt}"
        call, inputs = draw(example)
        outputs = compare(partial(call, *inputs), inputs, by_python, where)
        assert launched, where
        if example.gradients:
            outputs = tensors(outputs)
            grads = [torch.randn_like(x) for x in outputs]
            wanted = inputs[: example.gradients]
            gradient = partial(torch.autograd.grad, outputs, wanted, grads, retain_graph=True)
            compare(gradient, [*inputs, *outputs, *grads], by_python, f"gradient of {where}")
            assert bool(launched) == (example.op not in FORMULAS), where


def compare(call: Callable[[], Any], known: list[Any], by_python: bool, where: str) -> Any:
    with Watching():
        _, expected, _ = started(call, known)
    result, got, by_triton = started(call, known)
    assert got == expected, (where, got, expected)
    assert bool(by_triton) == (by_python and bool(got)), where
    return result


def counted(function: Any, /, *args: Any, **options: Any) -> Any:
    runs.append(function.__name__)
    return run(function, *args, **options)


def chosen() -> Iterator[Example]:
    """Of each operator the example with the fewest arguments and the one with the most."""
    found: dict[str, list[Example]] = {}
    for family in families():
        for example in examples(family):
            if example.name != COPIES:
                found.setdefault(example.op, []).append(example)
    for of_op in found.values():
        ordered = sorted(of_op, key=lambda example: len(draw(example)[1]))
        yield from {id(example): example for example in (ordered[0], ordered[-1])}.values()


def check_listeners() -> None:
    """That a profiler which comes later hears of replays, and of no more when it has gone."""
    call = partial(msf_kernels.gate_residual, new(1, 2, 64), new(1, 2, 64), new(1, 64))
    heard: list[str] = []
    for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        for _ in range(3):
            call()
        assert not heard
        listen = partial(heard.append, "a launch")
        hooks.add(listen)
        call()
        hooks.remove(listen)
        assert heard == ["a launch"]
        heard.clear()


run = JITFunction.run
counting = mock.patch.object(JITFunction, "run", counted)
with counting, no_triton(launcher), msf_kernels.backend("triton"):
    for example in chosen():
        check(example)
    check_listeners()
