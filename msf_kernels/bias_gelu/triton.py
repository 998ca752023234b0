"""bias_gelu and its gradient in Triton, each in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from ..dtypes import compute_dtype
from ..grid import TARGET_BLOCKS
from ..layout import contiguous, empty_like
from ..triton_support.launch import launch, power_of_2
from ..triton_support.rows import sum_partials
from .op import new_gradients
from .triton_kernels import backward_kernel, forward_kernel

# How many times 16 bytes a thread loads of each tensor before it uses the first. The backward loads
# two tensors, and keeps a sum for each element of its tile.
FORWARD_LOADS, BACKWARD_LOADS = 4, 2

# In backward an SM gets the five blocks of 128 threads that 96 registers a thread leave room for;
# left to itself, ptxas takes 40 registers and loads one vector after the other. Each block writes
# a row of sums, which costs the traffic of 1.3 rows.
BACKWARD_PROGRAMS, REGISTERS, MIN_ROWS = 5 * TARGET_BLOCKS // 4, 96, 16


@dataclass(frozen=True)
class Tile:
    """A program holds rows x columns of (B * N, D) at once; tiles are ``across`` as wide as D."""

    rows: int
    columns: int
    across: int
    warps: int

    @classmethod
    def of(cls, x: Tensor, loads: int) -> Tile:
        """Give a thread ``loads`` times 16 bytes, a row up to 1 KB, a block up to 128 threads."""
        vector = 16 // x.element_size()
        columns = min(power_of_2(x.shape[2]), 64 * vector)
        rows = 2 * loads
        warps = max(1, rows * columns // (loads * vector) // 32)
        return cls(rows, columns, triton.cdiv(x.shape[2], columns), warps)

    def arguments(self, x: Tensor, approximate: str) -> dict[str, Any]:
        return {
            "rows": x.shape[0] * x.shape[1],
            "channels": x.shape[2],
            "TANH": approximate == "tanh",
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "warps": self.warps,
            "fused": True,
        }


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    out = empty_like(x)
    tile = Tile.of(x, FORWARD_LOADS)
    launch(
        forward_kernel,
        x.device,
        tile.across * triton.cdiv(x.shape[0] * x.shape[1], tile.rows),
        x_ptr=x.contiguous(),
        bias_ptr=contiguous(bias),
        out_ptr=out,
        **tile.arguments(x, approximate),
    )
    return out


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = new_gradients(x, bias)
    batch, tokens, channels = x.shape
    rows = batch * tokens
    tile = Tile.of(x, BACKWARD_LOADS)
    slices = max(BACKWARD_PROGRAMS // max(tile.across, 1), 1)
    length = max(triton.cdiv(triton.cdiv(rows, slices), tile.rows) * tile.rows, MIN_ROWS)
    slices = triton.cdiv(rows, length)
    partials = None
    if bias is not None:
        partials = x.new_empty(slices, channels, dtype=compute_dtype(x))
    launch(
        backward_kernel,
        x.device,
        tile.across * slices,
        grad_ptr=grad.contiguous(),
        x_ptr=x.contiguous(),
        bias_ptr=contiguous(bias),
        grad_x_ptr=grad_x,
        partials_ptr=partials,
        length=length,
        maxnreg=REGISTERS,
        **tile.arguments(x, approximate),
    )
    if partials is not None:
        sum_partials([(partials, grad_bias[None])])
    return grad_x, grad_bias
