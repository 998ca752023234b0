"""A transformer block on a batch of images: its forward, or its forward and backward."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import msf
from msf.transformer import Block

from .arms import Arm
from .modelcall import ModelCall
from .results import Row
from .timing import Work
from .transformers import EAGER


def kind_of(backward: bool) -> str:
    return "block and backward" if backward else "block"


@dataclass(frozen=True)
class BlockPass(ModelCall):
    """A BlockPass is one forward of a block and, with `backward`, its backward.

    A call returns the outputs and, with `backward`, the gradients of all inputs and parameters.

    Args:
        inputs: x and h (B, N, D), and the condition c (B, D).
        cotangents: the gradients of both outputs.
        grid: height and width of the grid of tokens.
    """

    block: Block
    inputs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    grid: tuple[int, int]
    backward: bool
    whole = False

    @classmethod
    def draw(
        cls,
        stage: msf.StageConfig,
        grid: tuple[int, int],
        batch: int,
        backward: bool,
        device: torch.device,
    ) -> BlockPass:
        """Draw random weights and inputs in bfloat16, so that no zero gate hides a gradient."""
        where: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        size = grid[0] * stage.patch, grid[1] * stage.patch
        config = msf.MSFConfig(size, channels=4, num_classes=0, stages=(stage,), steps=(1,))
        block = Block(stage, config).to(**where)
        drawn = torch.randn(4, batch, grid[0] * grid[1], stage.width, **where).unbind()
        condition = torch.randn(batch, stage.width, **where)
        inputs = tuple(tensor.requires_grad_() for tensor in (*drawn[:2], condition))
        return cls(block, inputs, drawn[2:], grid, backward)

    @property
    def row(self) -> Row:
        shape = tuple(self.inputs[0].shape)
        name = kind_of(self.backward)
        return Row(name, name, shape, "bfloat16", 0, self.flops, images=shape[0])

    @property
    def flops(self) -> int:
        """Return the FLOPs of the matrix products; a backward has twice those of its forward."""
        batch, tokens, width = self.inputs[0].shape
        weights = sum(p.numel() for p in self.block.parameters() if p.dim() == 2)
        once = self.block.modulation.weight.numel()  # runs once an image, not once a token
        macs = batch * (once + tokens * (weights - once + 2 * tokens * width))
        return 2 * macs * (3 if self.backward else 1)

    def exact(self) -> tuple[Tensor, ...]:
        """Return the results in float64."""
        double = replace(
            self,
            block=copy.deepcopy(self.block).double(),
            inputs=tuple(tensor.detach().double().requires_grad_() for tensor in self.inputs),
            cotangents=tuple(tensor.double() for tensor in self.cotangents),
        )
        return double.results(EAGER)

    def make_work(self, arm: Arm) -> Work:
        return Work([partial(self._call, arm.prepare(self.block.forward))], arm.scope)

    def _call(self, run: Any) -> tuple[Tensor, ...]:
        with nullcontext() if self.backward else torch.no_grad():
            outputs = run(*self.inputs, self.grid)
        if not self.backward:
            return outputs
        wanted = (*self.inputs, *self.block.parameters())
        gradients = torch.autograd.grad(outputs, wanted, self.cotangents)
        return *(output.detach() for output in outputs), *gradients
