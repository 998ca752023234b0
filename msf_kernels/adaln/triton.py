"""Triton runs adaLN and the gated residual, forward and backward, in one pass over memory each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dtypes import compute_dtype
from ..grid import TARGET_BLOCKS
from ..layout import contiguous, empty_like, new_gradient
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
    y_bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rounding: str,
    norm: str = "layer",
    *,
    for_gradient: bool = True,
) -> tuple[Any, Any, Any]:
    """Return x_out if there is a gate; h and, for a gradient, statistics if there is a scale; None
    for others."""
    x = x.contiguous()
    x_out = h = statistics = None
    if gate is not None:
        x_out = empty_like(x)
    if scale is not None:
        h = empty_like(x)
        if for_gradient:
            statistics = x.new_empty((2, *x.shape[:2]), dtype=compute_dtype(x))
    mean, rstd = _mean_and_rstd(statistics)
    walk = Walk.of(x, FORWARD_PROGRAMS, 1)
    launch(
        forward_kernel,
        x.device,
        walk.count,
        x_ptr=x,
        y_ptr=contiguous(y),
        y_bias=modulation(None if y_bias is None else y_bias[None]),
        gate=modulation(gate),
        shift=modulation(shift),
        scale=modulation(scale),
        x_out_ptr=x_out,
        h_ptr=h,
        mean_ptr=mean,
        rstd_ptr=rstd,
        **walk.sizes(x),
        EPS=eps,
        EAGER=rounding == "eager",
        RMS=norm == "rms",
        warps=walk.warps,
        # Six blocks of 128 threads and five, or with a bias in registers too five and four.
        maxnreg=registers(walk, gate is not None, *((80, 96) if y_bias is None else (96, 128))),
    )
    return x_out, h, statistics


def backward(
    grad: Tensor,
    grad_x_out: Tensor | None,
    x_out: Tensor | None,
    y: Tensor | None,
    y_bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    statistics: Tensor | None,
    norm: str = "layer",
) -> tuple[Any, ...]:
    """Return the gradients of x, y, y_bias, gate, shift and scale; None for what is not there.

    That of an absent y_bias is empty.
    """
    batch, _, channels = grad.shape
    mean, rstd = _mean_and_rstd(contiguous(statistics))
    # Four sums of 18 channels, as a thread had them at a width of 1152, would spill.
    four = y_bias is not None and scale is not None
    walk = Walk.of(grad, BACKWARD_PROGRAMS, MIN_ROWS, held=34 if four else 36)
    grads = [None if x is None else empty_like(x) for x in (x_out, y)]
    parameters = [None if y_bias is None else y_bias[None], gate, shift, scale]
    totals: list[Any] = [None if x is None else empty_like(x) for x in parameters]
    sums: list[Any] = []
    for total in totals:
        if total is None or (total.shape[0] == batch and walk.slices == 1):
            sums.append(total)
        else:
            dtype = compute_dtype(grad)
            sums.append(grad.new_empty(batch * walk.slices, channels, dtype=dtype))
    bias_sums, gate_sums, shift_sums, scale_sums = sums
    launch(
        backward_kernel,
        grad.device,
        walk.count,
        grad_ptr=grad.contiguous(),
        grad_x_out_ptr=contiguous(grad_x_out),
        x_out_ptr=contiguous(x_out),
        y_ptr=contiguous(y),
        y_bias=modulation(None if y_bias is None else y_bias[None]),
        gate=modulation(gate),
        scale=modulation(scale),
        mean_ptr=mean,
        rstd_ptr=rstd,
        grad_x_ptr=grads[0],
        grad_y_ptr=grads[1],
        bias_sums_ptr=bias_sums,
        gate_sums_ptr=gate_sums,
        shift_sums_ptr=shift_sums,
        scale_sums_ptr=scale_sums,
        **walk.sizes(grad),
        RMS=norm == "rms",
        warps=walk.warps,
        # Four blocks of 128 threads, three. With a bias 128 would spill at a width of 768.
        maxnreg=registers(walk, gate is not None, 168 if four and channels == 768 else 128, 168),
    )
    sum_partials([pair for pair in zip(sums, totals) if pair[0] is not pair[1]])
    grad_bias = new_gradient(None, grad) if totals[0] is None else totals[0][0]
    return *grads, grad_bias, *totals[1:]


def _mean_and_rstd(statistics: Tensor | None) -> Any:
    return (None, None) if statistics is None else statistics.unbind()


def adaln_modulate(
    x: Tensor, *modulation: Any, for_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    return forward(x, None, None, None, *modulation, for_gradient=for_gradient)[1:]


def adaln_modulate_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, statistics: Tensor, norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    grads = backward(grad, None, x, None, None, None, shift, scale, statistics, norm)
    return grads[0], *grads[-2:]


def gate_residual(
    x: Tensor, y: Tensor, y_bias: Tensor | None, gate: Tensor, rounding: str
) -> Tensor:
    return forward(x, y, y_bias, gate, None, None, 0.0, rounding)[0]


def gate_residual_backward(
    grad: Tensor, y: Tensor, y_bias: Tensor | None, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, None, None, y, y_bias, gate, None, None, None)[1:4]


gate_residual_adaln, gate_residual_adaln_backward = forward, backward
