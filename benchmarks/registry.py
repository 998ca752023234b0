"""What is benchmarked: an operator call, the plain PyTorch it replaces, and what it must move.

A module of `benchmarks.ops` lists the benchmarks of one family in `BENCHMARKS`; being there is
all that registers it.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arms import Arm, backends, compiled, peer

Shape = tuple[int, ...]

# One tensor so large that every operator moves 300 MB or more in bfloat16, 5 times the L2 of an
# H200, which shows the kernel best; then latents of 256 and 512 pixel models at batches of training
# and sampling, largest first.
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
    """One call of an operator as a model makes it.

    Args:
        op: the operator, a name in `msf_kernels.OPERATORS`.
        inputs: (shape, dtype, generator) -> the arguments, random, on the generator's device.
        ours: the operator called with these arguments through its public function.
        eager: the same in plain PyTorch, as a user writes it who wants 32-bit precision inside.
            torch.compile of it is the other peer.
        peers: further ones.
        bytes: arguments -> the fewest bytes that the call must read and write.
        flops: arguments -> the operations of its matrix products; the others hide behind bytes.
        variant: what tells it from the operator's other benchmarks.
        gradients: 0 measures the forward, n the backward to the first n arguments.
        terms: how many numbers the longest sum behind an output adds up.
        roundings: how many times 16-bit eager rounds on the longest way to an output.
        own_roundings: how many times ours does.
        sizes: shape -> those by which a backend of the operator is chosen, if by any.
        dtypes: in which it is measured.
        shapes: in order of value, as not all may be measured.
    """

    op: str
    inputs: Callable[[Shape, torch.dtype, torch.Generator], tuple[Tensor, ...]]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    bytes: Callable[..., int]
    flops: Callable[..., int] = lambda *_: 0
    variant: str = ""
    gradients: int = 0
    terms: int = 1
    roundings: int = 1
    own_roundings: int = 1
    sizes: Callable[[Shape], tuple[int, ...]] = lambda _: ()
    peers: tuple[Arm, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    shapes: tuple[Shape, ...] = LATENTS

    @property
    def name(self) -> str:
        """Such as "pyramid_merge bilinear backward"."""
        direction = "backward" if self.gradients else ""
        return " ".join(filter(None, (self.op, self.variant, direction)))

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Return all that are compared: the peers first, then ours."""
        eager, compile = peer("eager", self.eager), peer("compile", compiled(self.eager))
        return eager, compile, *self.peers, *backends(self.op)

    def shapes_for(self, device: torch.device) -> tuple[Shape, ...]:
        """On a CPU without the large ones."""
        most = CPU_ELEMENTS if device.type == "cpu" else math.inf
        return tuple(shape for shape in self.shapes if math.prod(shape) <= most)


@dataclass(frozen=True)
class Case:
    """Random arguments of one call and, for a backward, the gradients of its outputs."""

    args: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]

    def double(self) -> Case:
        """The same numbers in float64."""
        args = (arg.detach().double().requires_grad_(arg.requires_grad) for arg in self.args)
        return Case(tuple(args), tuple(cotangent.double() for cotangent in self.cotangents))


def draw(
    benchmark: Benchmark, shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> Case:
    """Fresh arguments, and gradients of the outputs where the backward is measured."""
    args = benchmark.inputs(shape, dtype, generator)
    if not benchmark.gradients:
        return Case(args, ())
    with torch.no_grad():
        outputs = tensors(benchmark.eager(*args))
    for arg in args[: benchmark.gradients]:
        arg.requires_grad_()
    return Case(args, tuple(normal(out.shape, out.dtype, generator) for out in outputs))


def normal(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal numbers on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def tensors(result: Any) -> tuple[Tensor, ...]:
    """One output or several, always as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def find(op: str | None = None) -> list[Benchmark]:
    """The benchmarks of an operator, all by default. ValueError for one that has none."""
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
