"""Triton runs adaLN and the gated residual, forward and backward, in one pass over memory each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dtypes import compute_dtype
from ..grid import TARGET_BLOCKS
from ..layout import contiguous
from ..triton_support.launch import launch
from ..triton_support.rows import Walk, modulation, sum_partials
from .triton_kernels import backward_kernel, forward_kernel

# Forward an SM gets sixteen blocks, of which five or six run at once; backward the three or four
# that run at once, because each writes sums.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4 * TARGET_BLOCKS, TARGET_BLOCKS

# The backward of 16-bit tensors moves 12 bytes for a row and channel. It moves 24 for a slice and
# channel, three partial sums written and read: an eighth more where a slice has 16 rows.
MIN_ROWS = 16


def registers(walk: Walk, gated: bool, few: int, many: int) -> int:
    """Return how many registers a thread may use. Without it the compiler spills to use fewer.

    It is `many` with a gate and more than 12 channels a thread, else `few`, and at most the 64
    that a block of 1024 threads has for each.
    """
    threads = 32 * walk.warps
    channels = walk.rows * walk.piece * walk.pieces // threads
    return min(many if gated and channels > 12 else few, 65536 // threads)


def forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    eager: bool,
) -> tuple[Any, Any, Any, Any]:
    """Return x_out if there is a gate; h, mean and rstd if there is a scale; None for others."""
    x = x.contiguous()
    x_out = h = mean = rstd = None
    if gate is not None:
        x_out = x.new_empty(x.shape)
    if scale is not None:
        h = x.new_empty(x.shape)
        mean = x.new_empty(x.shape[:2], dtype=compute_dtype(x))
        rstd = mean.new_empty(mean.shape)
    walk = Walk.of(x, FORWARD_PROGRAMS, 1)
    launch(
        forward_kernel,
        x.device,
        walk.count,
        x_ptr=x,
        y_ptr=contiguous(y),
        gate=modulation(gate),
        shift=modulation(shift),
        scale=modulation(scale),
        x_out_ptr=x_out,
        h_ptr=h,
        mean_ptr=mean,
        rstd_ptr=rstd,
        **walk.sizes(x),
        EPS=eps,
        EAGER=eager,
        warps=walk.warps,
        maxnreg=registers(walk, gate is not None, 80, 96),  # six blocks of 128 threads, five
    )
    return x_out, h, mean, rstd


def backward(
    grad: Tensor,
    grad_x_out: Tensor | None,
    x_out: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> tuple[Any, ...]:
    """Return the gradients of x, y, gate, shift and scale; None for what is not there."""
    batch, _, channels = grad.shape
    walk = Walk.of(grad, BACKWARD_PROGRAMS, MIN_ROWS)
    of = x_out, y, gate, shift, scale
    grads: list[Any] = [None if x is None else x.new_empty(x.shape) for x in of]
    sums: list[Any] = []
    for total in grads[2:]:
        if total is None or (total.shape[0] == batch and walk.slices == 1):
            sums.append(total)
        else:
            dtype = compute_dtype(grad)
            sums.append(grad.new_empty(batch * walk.slices, channels, dtype=dtype))
    grad_x, grad_y, *_ = grads
    gate_sums, shift_sums, scale_sums = sums
    launch(
        backward_kernel,
        grad.device,
        walk.count,
        grad_ptr=grad.contiguous(),
        grad_x_out_ptr=contiguous(grad_x_out),
        x_out_ptr=contiguous(x_out),
        y_ptr=contiguous(y),
        gate=modulation(gate),
        scale=modulation(scale),
        mean_ptr=contiguous(mean),
        rstd_ptr=contiguous(rstd),
        grad_x_ptr=grad_x,
        grad_y_ptr=grad_y,
        gate_sums_ptr=gate_sums,
        shift_sums_ptr=shift_sums,
        scale_sums_ptr=scale_sums,
        **walk.sizes(grad),
        warps=walk.warps,
        maxnreg=registers(walk, gate is not None, 128, 168),  # four blocks of 128 threads, three
    )
    sum_partials([pair for pair in zip(sums, grads[2:]) if pair[0] is not pair[1]])
    return tuple(grads)


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, eager: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return forward(x, None, None, shift, scale, eps, eager)[1:]


def adaln_modulate_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, _, _, *grads = backward(grad, None, x, None, None, shift, scale, mean, rstd)
    return grad_x, *grads


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, eager: bool) -> Tensor:
    return forward(x, y, gate, None, None, 0.0, eager)[0]


def gate_residual_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return backward(grad, None, None, y, gate, None, None, None, None)[1:3]


def gate_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, eager: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(x, y, gate, shift, scale, eps, eager)


gate_residual_adaln_backward = backward
