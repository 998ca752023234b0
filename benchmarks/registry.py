"""Benchmarks of operators: a call, the plain PyTorch that it replaces, and what it must move.

A module of `benchmarks.ops` lists the benchmarks of one family in `BENCHMARKS`. No other
registration is needed.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import msf_kernels
from msf_kernels.examples import Example, New, Shape

from .arms import Arm, backends, compiled, peer

# The first is so large that every operator moves 300 MB or more in bfloat16, 5 times the L2 of an
# H200, which shows the kernel best. Then come latents of models of 256 and 512 pixels, at batches
# of training and sampling, largest first.
LATENTS: tuple[Shape, ...] = (
    (64, 4, 512, 512),
    (256, 4, 64, 64),
    (256, 4, 32, 32),
    (64, 4, 64, 64),
    (64, 4, 32, 32),
    (1, 4, 64, 64),
    (1, 4, 32, 32),
)
CPU_ELEMENTS = 64 * 4 * 32 * 32  # larger shapes are left to GPUs


@dataclass(frozen=True)
class Benchmark:
    """A Benchmark is an example call of an operator, beside what a user could call instead.

    `eager`, peers, `bytes` and `flops` take the inputs of the example, and its options by keyword.

    Args:
        example: the call, its name and its inputs.
        eager: the same in plain PyTorch, as a user writes it. It is a peer, and so is torch.compile
            of it.
        bytes: the fewest that the call must read and write.
        flops: the operations of its matrix products; the others hide behind bytes.
        gradients: 0 measures the call, n its gradient with respect to the first n inputs.
        terms: how many numbers the longest sum behind an output adds up one after the other.
        roundings: how many times 16-bit eager rounds on the longest way to an output.
        own_roundings: how many times our arms round there.
        sizes: shape -> the sizes on which the choice of a backend depends, if it does.
        peers: further peers.
        dtypes: the dtypes in which it is measured.
        shapes: the shapes in order of value, as not all may be measured.
    """

    example: Example
    eager: Callable[..., Any]
    bytes: Callable[..., int]
    flops: Callable[..., int] = lambda *_, **options: 0
    gradients: int = 0
    terms: int = 1
    roundings: int = 1
    own_roundings: int = 1
    sizes: Callable[[Shape], tuple[int, ...]] = lambda _: ()
    peers: tuple[Arm, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    shapes: tuple[Shape, ...] = LATENTS

    @property
    def op(self) -> str:
        return self.example.op

    @property
    def name(self) -> str:
        """Return the name, such as "pyramid_merge bilinear backward"."""
        return f"{self.example.name} backward" if self.gradients else self.example.name

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Return all arms that are compared: the peers first, then ours."""
        eager, compile = peer("eager", self.eager), peer("compile", compiled(self.eager))
        return eager, compile, *self.peers, *backends(self.op)

    def shapes_for(self, device: torch.device) -> tuple[Shape, ...]:
        """Return the shapes to measure, on a CPU without the large ones."""
        most = CPU_ELEMENTS if device.type == "cpu" else math.inf
        return tuple(shape for shape in self.shapes if math.prod(shape) <= most)


@dataclass(frozen=True)
class Drawn:
    """A Drawn has random inputs of one call and, for a backward, gradients of its outputs."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    cotangents: tuple[Tensor, ...]


def draw(
    benchmark: Benchmark, shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> Drawn:
    """Draw inputs, and gradients of the outputs where the backward is measured."""

    call_dtype = dtype

    def new(*sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return normal(sizes, dtype or call_dtype, generator)

    call, args = benchmark.example.draw(new, shape)
    if not benchmark.gradients:
        return Drawn(call, args, ())
    with torch.no_grad(), msf_kernels.backend("reference"):
        outputs = tensors(call(*args))
    for arg in args[: benchmark.gradients]:
        arg.requires_grad_()
    return Drawn(call, args, tuple(normal(out.shape, out.dtype, generator) for out in outputs))


def in_one_dtype(example: Example) -> Example:
    """Return the example with its bias in x's dtype, as eager PyTorch has it there."""

    def inputs(new: New, shape: Shape) -> dict[str, Tensor]:
        made = example.inputs(new, shape)
        return {name: tensor.to(made["x"].dtype) for name, tensor in made.items()}

    return replace(example, inputs=inputs)


def in_float64(case: Drawn, benchmark: Benchmark, shape: Shape) -> Drawn:
    """Return the same numbers in a float64 call's dtypes, in which some tables are float32."""

    def new(*sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(sizes, dtype=dtype or torch.float64, device="meta")

    _, wide = benchmark.example.draw(new, shape)
    args = (
        arg.detach().to(like.dtype).requires_grad_(arg.requires_grad)
        for arg, like in zip(case.args, wide)
    )
    return Drawn(case.call, tuple(args), tuple(cotangent.double() for cotangent in case.cotangents))


def normal(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def tensors(result: Any) -> tuple[Tensor, ...]:
    """Return one output or several, always as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def find(op: str | None = None) -> list[Benchmark]:
    """Return the benchmarks of an operator, all by default. Raise ValueError if it has none."""
    from . import ops

    modules = sorted(module.name for module in pkgutil.iter_modules(ops.__path__))
    families = [importlib.import_module(f"{ops.__name__}.{name}") for name in modules]
    known: list[Benchmark] = [benchmark for family in families for benchmark in family.BENCHMARKS]
    if op is None:
        return known
    if chosen := [benchmark for benchmark in known if benchmark.op == op]:
        return chosen
    names = ", ".join(dict.fromkeys(benchmark.op for benchmark in known))
    raise ValueError(f"unknown op {op!r}: known are {names}")
