"""One small call of every example of the operators, for the checks that all operators share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msf_kernels.examples import Example, all_examples
from numerics import normal


@dataclass(frozen=True)
class Case:
    """A call as a function of its inputs, those that get a gradient first."""

    example: Example
    call: Callable[..., Any]

    @property
    def op(self) -> str:
        return self.example.op

    @property
    def name(self) -> str:
        return self.example.name.replace(" ", "-")

    @property
    def gradient(self) -> bool:
        """Whether the operator has one."""
        return bool(self.example.gradients)

    def inputs(self, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
        _, inputs = self.example.draw(partial(_new, dtype), (batch, *self.example.shape[1:]))
        for tensor in inputs[: self.example.gradients]:
            tensor.requires_grad_()
        return list(inputs)

    def outputs(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        result = self.call(*inputs)
        return (result,) if isinstance(result, Tensor) else result


def _new(call_dtype: torch.dtype, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return normal(*shape, dtype=dtype or call_dtype)


def leaves(inputs: list[Tensor]) -> list[Tensor]:
    """Those that get a gradient."""
    return [tensor for tensor in inputs if tensor.requires_grad]


CASES = [Case(example, example.draw(partial(_new, torch.float64))[0]) for example in all_examples()]
