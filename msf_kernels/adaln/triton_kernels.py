"""The Triton kernels of adaLN and the gated residual: a row of D channels is read once.

A slice is some tokens of one sample. A program walks through it by ROWS tokens at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_support.arithmetic import narrow, widen
from ..triton_support.rows import load_modulation, load_row, mean_of_row, own_slice, store_row


@triton.jit
def rounded(x, DTYPE: tl.constexpr, ROUND: tl.constexpr = True):
    """Return x as if stored in DTYPE and read again."""
    return widen(narrow(x, DTYPE)) if ROUND else x


@triton.jit
def forward_kernel(
    x_ptr,  # (B, N, D)
    y_ptr,  # (B, N, D), absent without a gate
    y_bias,  # Modulation (1, D) or absent
    gate,  # Modulation (B, D) or absent
    shift,  # Modulation (B, D), absent without a scale
    scale,  # Modulation (B, D) or absent
    x_out_ptr,  # (B, N, D), absent without a gate
    h_ptr,  # (B, N, D), absent without a scale
    mean_ptr,  # (B, N), absent without a scale or a gradient
    rstd_ptr,  # (B, N), absent as mean_ptr
    tokens,
    slices,
    slice_rows,
    PIECES,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    EAGER: tl.constexpr,
    RMS: tl.constexpr,
):
    """Write x_out = x + gate * (y + y_bias) with a gate; h = LN(x_out) * (1 + scale) + shift with
    a scale. With RMS the norm subtracts no mean."""
    columns = [tl.arange(0, PIECE)[None, :] + i * PIECE for i in PIECES]
    sample, first, end = own_slice(tokens, slices, slice_rows)
    dtype = x_ptr.dtype.element_ty
    if gate is not None:
        gates = load_modulation(gate, sample, columns, ROWS, D)
    if y_bias is not None:
        biases = load_modulation(y_bias, sample, columns, ROWS, D)
    if scale is not None:
        shifts = load_modulation(shift, sample, columns, ROWS, D)
        scales = load_modulation(scale, sample, columns, ROWS, D)
        factors = [rounded(1 + s, dtype, EAGER) for s in scales]
    # Not a range, because the interpreter of Triton 3.6 cannot count one with NumPy 2.4.
    while first < end:
        token = first + tl.arange(0, ROWS)[:, None]
        exists, row = token < end, sample * tokens + token
        value = load_row(x_ptr + row * D, exists, columns, D)
        if gate is not None:
            branch = load_row(y_ptr + row * D, exists, columns, D)
            if y_bias is not None:
                branch = [rounded(branch[i] + biases[i], dtype, EAGER) for i in PIECES]
            gated = [rounded(gates[i] * branch[i], dtype, EAGER) for i in PIECES]
            value = [rounded(value[i] + gated[i], dtype) for i in PIECES]
            store_row(x_out_ptr + row * D, exists, columns, value, D)
        if scale is not None:
            if not RMS:
                centre = mean_of_row(value, D)
                value = [v - centre for v in value]
                if D % PIECE != 0:
                    value = [tl.where(columns[i] < D, value[i], 0) for i in PIECES]
            spread = tl.rsqrt(mean_of_row([v * v for v in value], D) + EPS)
            value = [rounded(v * spread, dtype, EAGER) for v in value]
            value = [rounded(value[i] * factors[i], dtype, EAGER) for i in PIECES]
            value = [shifts[i] + value[i] for i in PIECES]
            store_row(h_ptr + row * D, exists, columns, value, D)
            if mean_ptr is not None:
                tl.store(mean_ptr + row, tl.zeros_like(spread) if RMS else centre, mask=exists)
                tl.store(rstd_ptr + row, spread, mask=exists)
        first += ROWS


@triton.jit
def store_sum(sums_ptr, total, columns, ROWS: tl.constexpr, D: tl.constexpr):
    """Write the sum of a tile's rows to this program's row of the sums.

    The first row of a tile stores it, so that no thread has to wait for another.
    """
    row = tl.arange(0, ROWS)[:, None]
    start = sums_ptr + tl.program_id(0).to(tl.int64) * D + tl.zeros_like(row)
    for i in tl.static_range(len(columns)):
        value = narrow(tl.sum(total[i], 0, keep_dims=True), sums_ptr.dtype.element_ty)
        tl.store(start + columns[i], value, mask=(row == 0) & (columns[i] < D))


@triton.jit
def backward_kernel(
    grad_ptr,  # (B, N, D): of h with a scale, else of x_out
    grad_x_out_ptr,  # (B, N, D) or absent
    x_out_ptr,  # (B, N, D), absent without a scale
    y_ptr,  # (B, N, D), absent without a gate
    y_bias,  # Modulation (1, D) or absent
    gate,  # Modulation (B, D) or absent
    scale,  # Modulation (B, D) or absent
    mean_ptr,  # (B, N), absent without a scale
    rstd_ptr,  # (B, N), absent without a scale
    grad_x_ptr,  # (B, N, D), absent without a scale
    grad_y_ptr,  # (B, N, D), absent without a gate
    bias_sums_ptr,  # (B * slices, D), absent without a bias
    gate_sums_ptr,  # (B * slices, D), absent without a gate
    shift_sums_ptr,  # (B * slices, D), absent without a scale
    scale_sums_ptr,  # (B * slices, D), absent without a scale
    tokens,
    slices,
    slice_rows,
    PIECES,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    RMS: tl.constexpr,
):
    """Take the gradient through the norm with a scale, then through the gate with a gate.

    Behind the norm it becomes the sum of itself and grad_x_out.
    """
    columns = [tl.arange(0, PIECE)[None, :] + i * PIECE for i in PIECES]
    sample, first, end = own_slice(tokens, slices, slice_rows)
    dtype: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    grad_sum = [tl.zeros((ROWS, PIECE), dtype) for i in PIECES]  # of x_out, over tokens
    gate_sum = [tl.zeros((ROWS, PIECE), dtype) for i in PIECES]
    shift_sum = [tl.zeros((ROWS, PIECE), dtype) for i in PIECES]
    scale_sum = [tl.zeros((ROWS, PIECE), dtype) for i in PIECES]
    while first < end:
        token = first + tl.arange(0, ROWS)[:, None]
        exists, row = token < end, sample * tokens + token
        # Every load of a row comes before the first sum over it, where threads wait for each other.
        value = load_row(grad_ptr + row * D, exists, columns, D)
        if scale is not None:
            normalised = load_row(x_out_ptr + row * D, exists, columns, D)
            centre = tl.load(mean_ptr + row, mask=exists, other=0)
            spread = tl.load(rstd_ptr + row, mask=exists, other=0)
        if grad_x_out_ptr is not None:
            residual = load_row(grad_x_out_ptr + row * D, exists, columns, D)
        if gate is not None:
            branch = load_row(y_ptr + row * D, exists, columns, D)
        if scale is not None:
            normalised = [(x - centre) * spread for x in normalised]
            product = [value[i] * normalised[i] for i in PIECES]
            shift_sum = [shift_sum[i] + value[i] for i in PIECES]
            scale_sum = [scale_sum[i] + product[i] for i in PIECES]
            # The modulations come from L1. Kept, their 36 registers would cost a block in four.
            factors = [1 + s for s in load_modulation(scale, sample, columns, ROWS, D)]
            along = mean_of_row([product[i] * factors[i] for i in PIECES], D)
            value = [value[i] * factors[i] for i in PIECES]
            if not RMS:
                across = mean_of_row(value, D)
                value = [v - across for v in value]
            value = [(value[i] - normalised[i] * along) * spread for i in PIECES]
            if grad_x_out_ptr is not None:
                value = [value[i] + residual[i] for i in PIECES]
            store_row(grad_x_ptr + row * D, exists, columns, value, D)
        if gate is not None:
            gates = load_modulation(gate, sample, columns, ROWS, D)
            gated = [value[i] * gates[i] for i in PIECES]
            store_row(grad_y_ptr + row * D, exists, columns, gated, D)
            gate_sum = [gate_sum[i] + value[i] * branch[i] for i in PIECES]
            if y_bias is not None:
                grad_sum = [grad_sum[i] + value[i] for i in PIECES]
        first += ROWS
    if y_bias is not None:
        # A slice has one gate: the sum of grad * (y + y_bias) is that of grad * y and y_bias * sum.
        biases = load_modulation(y_bias, sample, columns, ROWS, D)
        gates = load_modulation(gate, sample, columns, ROWS, D)
        gate_sum = [gate_sum[i] + biases[i] * grad_sum[i] for i in PIECES]
        bias_sum = [gates[i] * grad_sum[i] for i in PIECES]
        store_sum(bias_sums_ptr, bias_sum, columns, ROWS, D)
    if gate is not None:
        store_sum(gate_sums_ptr, gate_sum, columns, ROWS, D)
    if scale is not None:
        store_sum(shift_sums_ptr, shift_sum, columns, ROWS, D)
        store_sum(scale_sums_ptr, scale_sum, columns, ROWS, D)
