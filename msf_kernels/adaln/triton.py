"""Triton runs adaLN and the gated residual, forward and backward, in one pass over memory each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..layout import contiguous
from ..triton_support.arithmetic import narrow, widen
from ..triton_support.launch import launch
from ..triton_support.rows import (
    Walk,
    load_modulation,
    load_row,
    mean_of_row,
    modulation,
    own_slice,
    store_row,
    sum_partials,
)

# For each of the 132 multiprocessors of an H200 sixteen blocks forward, of which five or six run at
# once, and backward the three or four that run at once, because each writes sums.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 16 * 132, 4 * 132

# For a row and channel the backward moves 12 bytes, of 16-bit tensors, for a slice and channel 24:
# three partial sums, written and read. Of 16 rows that is an eighth more.
MIN_ROWS = 16


@triton.jit
def rounded(x, DTYPE: tl.constexpr, ROUND: tl.constexpr = True):
    """x as if stored in DTYPE and read again."""
    return widen(narrow(x, DTYPE)) if ROUND else x


@triton.jit
def forward_kernel(
    x,
    y,
    gate,
    shift,
    scale,
    x_out,
    h,
    mean,
    rstd,
    tokens,
    slices,
    slice_rows,
    PIECES,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    EAGER: tl.constexpr,
):
    """x_out = x + gate * y with a gate, then h = LN(x_out) * (1 + scale) + shift with a scale."""
    columns = [tl.arange(0, PIECE)[None, :] + i * PIECE for i in PIECES]
    sample, first, end = own_slice(tokens, slices, slice_rows)
    dtype = x.dtype.element_ty
    if gate is not None:
        gates = load_modulation(gate, sample, columns, ROWS, D)
    if scale is not None:
        shifts = load_modulation(shift, sample, columns, ROWS, D)
        scales = load_modulation(scale, sample, columns, ROWS, D)
        factors = [rounded(1 + s, dtype, EAGER) for s in scales]
    # Not a range, because the interpreter of Triton 3.6 cannot count one with NumPy 2.4.
    while first < end:
        token = first + tl.arange(0, ROWS)[:, None]
        exists, row = token < end, sample * tokens + token
        value = load_row(x + row * D, exists, columns, D)
        if gate is not None:
            branch = load_row(y + row * D, exists, columns, D)
            gated = [rounded(gates[i] * branch[i], dtype, EAGER) for i in PIECES]
            value = [rounded(value[i] + gated[i], dtype) for i in PIECES]
            store_row(x_out + row * D, exists, columns, value, D)
        if scale is not None:
            centre = mean_of_row(value, D)
            value = [v - centre for v in value]
            if D % PIECE != 0:
                value = [tl.where(columns[i] < D, value[i], 0) for i in PIECES]
            spread = tl.rsqrt(mean_of_row([v * v for v in value], D) + EPS)
            value = [rounded(v * spread, dtype, EAGER) for v in value]
            value = [rounded(value[i] * factors[i], dtype, EAGER) for i in PIECES]
            value = [shifts[i] + value[i] for i in PIECES]
            store_row(h + row * D, exists, columns, value, D)
            tl.store(mean + row, centre, mask=exists)
            tl.store(rstd + row, spread, mask=exists)
        first += ROWS


@triton.jit
def store_sum(sums, total, columns, ROWS: tl.constexpr, D: tl.constexpr):
    """The sum of a tile's rows, as this program's row of ``sums``, by the threads that have it."""
    row = tl.arange(0, ROWS)[:, None]
    start = sums + tl.program_id(0).to(tl.int64) * D + tl.zeros_like(row)
    for i in tl.static_range(len(columns)):
        value = narrow(tl.sum(total[i], 0, keep_dims=True), sums.dtype.element_ty)
        tl.store(start + columns[i], value, mask=(row == 0) & (columns[i] < D))


@triton.jit
def backward_kernel(
    grad,
    grad_residual,
    x_out,
    y,
    gate,
    scale,
    mean,
    rstd,
    grad_x,
    grad_y,
    gate_sums,
    shift_sums,
    scale_sums,
    tokens,
    slices,
    slice_rows,
    PIECES,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Through the norm with a scale, which adds the residual's gradient; the gate with a gate."""
    columns = [tl.arange(0, PIECE)[None, :] + i * PIECE for i in PIECES]
    sample, first, end = own_slice(tokens, slices, slice_rows)
    dtype: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    gate_sum = [tl.zeros((ROWS, PIECE), dtype) for i in PIECES]
    shift_sum = [tl.zeros((ROWS, PIECE), dtype) for i in PIECES]
    scale_sum = [tl.zeros((ROWS, PIECE), dtype) for i in PIECES]
    while first < end:
        token = first + tl.arange(0, ROWS)[:, None]
        exists, row = token < end, sample * tokens + token
        # Every load of a row before the first sum over it, where the threads wait for each other.
        value = load_row(grad + row * D, exists, columns, D)
        if scale is not None:
            normalised = load_row(x_out + row * D, exists, columns, D)
            centre = tl.load(mean + row, mask=exists, other=0)
            spread = tl.load(rstd + row, mask=exists, other=0)
        if grad_residual is not None:
            residual = load_row(grad_residual + row * D, exists, columns, D)
        if gate is not None:
            branch = load_row(y + row * D, exists, columns, D)
        if scale is not None:
            normalised = [(x - centre) * spread for x in normalised]
            product = [value[i] * normalised[i] for i in PIECES]
            shift_sum = [shift_sum[i] + value[i] for i in PIECES]
            scale_sum = [scale_sum[i] + product[i] for i in PIECES]
            # From L1: kept, the modulations' 36 registers would cost a block in four.
            factors = [1 + s for s in load_modulation(scale, sample, columns, ROWS, D)]
            along = mean_of_row([product[i] * factors[i] for i in PIECES], D)
            value = [value[i] * factors[i] for i in PIECES]
            across = mean_of_row(value, D)
            value = [((value[i] - across) - normalised[i] * along) * spread for i in PIECES]
            if grad_residual is not None:
                value = [value[i] + residual[i] for i in PIECES]
            store_row(grad_x + row * D, exists, columns, value, D)
        if gate is not None:
            gates = load_modulation(gate, sample, columns, ROWS, D)
            gated = [value[i] * gates[i] for i in PIECES]
            store_row(grad_y + row * D, exists, columns, gated, D)
            gate_sum = [gate_sum[i] + value[i] * branch[i] for i in PIECES]
        first += ROWS
    if gate is not None:
        store_sum(gate_sums, gate_sum, columns, ROWS, D)
    if scale is not None:
        store_sum(shift_sums, shift_sum, columns, ROWS, D)
        store_sum(scale_sums, scale_sum, columns, ROWS, D)


def registers(walk: Walk, gated: bool, few: int, many: int) -> int:
    """Return how many registers a thread may use, or the compiler spills some to use fewer.

    That is `many` with a gate and more than 12 channels a thread, else `few`, and at most the 64
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
    """Return x_out with a gate, h, mean and rstd with a scale, and None for the others."""
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
        *(forward_kernel, x.device, walk.count, x, contiguous(y)),
        *(*map(modulation, (gate, shift, scale)), x_out, h, mean, rstd, *walk.sizes(x)),
        *(eps, eager),
        warps=walk.warps,
        maxnreg=registers(walk, gate is not None, 80, 96),  # six blocks of 128 threads, five
    )
    return x_out, h, mean, rstd


def backward(
    grad: Tensor,
    grad_residual: Tensor | None,
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
    launch(
        *(backward_kernel, grad.device, walk.count, grad.contiguous(), contiguous(grad_residual)),
        *(contiguous(x_out), contiguous(y), modulation(gate), modulation(scale)),
        *(contiguous(mean), contiguous(rstd)),
        *(*grads[:2], *sums, *walk.sizes(grad)),
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


def audited(op: str, D: int) -> Callable[..., Any]:
    """Make a call that runs the operator in both roundings, and its gradient."""

    def call(new: Callable[..., Tensor]) -> None:
        (x, y), (gate, shift, scale) = new(2, 64, 256, D).unbind(), new(64, 6 * D).chunk(6, 1)[:3]
        for eager in (True, False):
            if op == "adaln_modulate":
                h, *rest = adaln_modulate(x, shift, scale, 1e-6, eager)
            elif op == "gate_residual":
                gate_residual(x, y, gate, eager)
            else:
                x_out, h, *rest = gate_residual_adaln(x, y, gate, shift, scale, 1e-6, eager)
        if op == "adaln_modulate":
            adaln_modulate_backward(h, x, shift, scale, *rest)
        elif op == "gate_residual":
            gate_residual_backward(x, y, gate)
        else:
            gate_residual_adaln_backward(h, x_out, x_out, y, gate, shift, scale, *rest)

    return call


# Registers: a thread of the backward keeps three sums and five numbers of a row for each of its up
# to 18 channels; three blocks of 128 threads, of up to 54 loads each, fit.
BUDGET = 168

# Calls that launch every kernel, at the widths of transformers: of others, some spill.
# new(*shape) makes a tensor. See audit/triton.py.
AUDITED = {
    f"{op} {D}": audited(op, D)
    for op in ("adaln_modulate", "gate_residual", "gate_residual_adaln")
    for D in (384, 768, 1024, 1152, 1536)
}
