"""Example calls of the operators: the audit compiles them, tests check them, benchmarks time them.

A family has its own in `EXAMPLES` of its `examples.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class New(Protocol):
    """New makes a tensor of normal numbers, in the dtype of the call unless one is named."""

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Example:
    """An Example makes a call of an operator with one choice of options, for any shape.

    Args:
        op: the operator.
        function: its public function, or what calls it.
        inputs: (new, shape) -> {argument: tensor}, those that get a gradient first. The shape is
            that of the tensor that the call is about, such as tokens (B, N, D) or images
            (B, C, H, W).
        shape: a small one to test at, whose first size, the batch, the tests replace.
        options: shape -> the arguments that are no tensors, on which the equation depends.
        gradients: how many of the inputs get a gradient.
        variant: a name that tells it from the op's other examples.
        audited: the shapes at which the audit compiles the kernels of the call and of its gradient.
            At others nobody knows whether they spill registers.
        audited_forward: the shapes at which it compiles those of a call without a gradient.
    """

    op: str
    function: Callable[..., Any]
    inputs: Callable[[New, Shape], dict[str, Tensor]]
    shape: Shape
    options: Callable[[Shape], dict[str, Any]] = lambda _: {}
    gradients: int = 0
    variant: str = ""
    audited: tuple[Shape, ...] = ()
    audited_forward: tuple[Shape, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant}".strip()

    def draw(
        self, new: New, shape: Shape | None = None
    ) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """Return the call as a function of its inputs, and the inputs."""
        inputs = self.inputs(new, shape or self.shape)
        names, options = tuple(inputs), self.options(shape or self.shape)

        def call(*tensors: Tensor) -> Any:
            return self.function(**dict(zip(names, tensors)), **options)

        return call, tuple(inputs.values())


def families() -> list[str]:
    """Return the names of the folders that have examples."""
    return sorted(file.parent.name for file in Path(__file__).parent.glob("*/examples.py"))


def examples(family: str) -> tuple[Example, ...]:
    module = importlib.import_module(f"{__package__}.{family}.examples")
    found: tuple[Example, ...] = module.EXAMPLES
    return found


def all_examples() -> Iterator[Example]:
    for family in families():
        yield from examples(family)
