"""The Triton kernels of bias_gelu, on tiles of ROWS x COLUMNS of a tensor (rows, channels).

The arithmetic is that of csrc/kernels/bias_gelu.cu, which says what it costs an SM.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_support.arithmetic import INTERPRETED, narrow, widen


@triton.jit
def reciprocal(x):
    """Return 1 / x. Triton's own division of float32 takes five instructions, this takes one."""
    if INTERPRETED or x.dtype == tl.float64:
        return 1 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def logistic_tail(a):
    """Return sigmoid(-2 u) where u = sqrt(2 / pi) * (a + 0.044715 a^3), and its density."""
    if a.dtype == tl.float64:
        power = tl.exp(a * (1.5957691216057308 + 0.07135481627260025 * a * a))
    else:  # the factors are over log(2)
        power = tl.exp2(a * (2.302208198144325 + 0.1029432395800235 * a * a))
    beyond = reciprocal(1 + power)
    return beyond, beyond * (1 - beyond) * (1.5957691216057308 + 0.21406444881780075 * a * a)


@triton.jit
def normal_tail(a):
    """Return how much of the normal distribution lies beyond a >= 0, and its density there.

    In float32 the former is exp(-a^2 / 2) * t * p(t) where t = 1 / (1 + 0.3 a). The polynomial was
    fitted to the least relative error from a = 0 to 14, which is 1.5e-7.
    """
    if a.dtype == tl.float64:
        bell = tl.exp(a * a * -0.5)
        beyond = 0.5 - 0.5 * tl.erf(a * 0.70710678118654752)
    else:
        bell = tl.exp2(a * a * -0.7213475204444817)
        t = reciprocal(1 + 0.3 * a)
        p = 0.0356747786 * t - 0.157203101
        p = p * t + 0.206353537
        p = p * t - 0.0536836714
        p = p * t + 0.12856164
        p = p * t + 0.0999134882
        p = p * t + 0.120753957
        p = p * t + 0.119629299
        beyond = bell * t * p
    return beyond, bell * 0.39894228040143268


@triton.jit
def tail_of(x, TANH: tl.constexpr):
    """Return a = |x|, how much of gelu's distribution lies beyond it, and its density there.

    a is at most 14, where all is saturated: beyond, infinity would meet 0.
    """
    a = tl.abs(x)
    a = tl.where(a > 14, tl.full((), 14, x.dtype), a)  # unlike a minimum this lets NaN pass
    beyond, density = logistic_tail(a) if TANH else normal_tail(a)
    return a, beyond, density


@triton.jit
def gelu(x, TANH: tl.constexpr):
    a, beyond, _ = tail_of(x, TANH)
    return tl.where(x < 0, 0, x) - a * beyond


@triton.jit
def gelu_derivative(x, TANH: tl.constexpr):
    """Return the derivative; those at x and -x add up to 1."""
    a, beyond, density = tail_of(x, TANH)
    negative = beyond - a * density
    return tl.where(x < 0, negative, 1 - negative)


@triton.jit
def own_columns(channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return which rows of tiles are this program's, and its channels once for each row of a tile.

    What is read there of a bias lies in the registers as the rows do.
    """
    across = tl.cdiv(channels, COLUMNS)
    channel = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.program_id(0) // across, channel + tl.zeros((ROWS, 1), tl.int32)


@triton.jit
def load_biased(x_ptr, bias_ptr, at, exists, channel, channels):
    """Return x + bias, widened."""
    x = widen(tl.load(x_ptr + at, mask=exists, other=0))
    if bias_ptr is not None:
        x += widen(tl.load(bias_ptr + channel, mask=channel < channels, other=0))
    return x


@triton.jit
def forward_kernel(
    x_ptr,  # (rows, channels)
    bias_ptr,  # (channels,) or absent
    out_ptr,  # (rows, channels)
    rows,
    channels,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write gelu(x + bias) of a tile."""
    index, channel = own_columns(channels, ROWS, COLUMNS)
    row = index.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at, exists = row * channels + channel, (row < rows) & (channel < channels)
    out = gelu(load_biased(x_ptr, bias_ptr, at, exists, channel, channels), TANH)
    tl.store(out_ptr + at, narrow(out, out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def backward_kernel(
    grad_ptr,  # (rows, channels)
    x_ptr,  # (rows, channels)
    bias_ptr,  # (channels,) or absent
    grad_x_ptr,  # (rows, channels)
    partials_ptr,  # (slices, channels), absent without a bias
    length,
    rows,
    channels,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradient of x for a slice of ``length`` rows, and its sum over them."""
    index, channel = own_columns(channels, ROWS, COLUMNS)
    dtype = x_ptr.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), tl.float64 if dtype == tl.float64 else tl.float32)
    first = index.to(tl.int64) * length
    end = tl.minimum(first + length, rows)
    # Not a range, because the interpreter of Triton 3.6 cannot count one with NumPy 2.4.
    while first < end:
        row = first + tl.arange(0, ROWS)[:, None]
        at, exists = row * channels + channel, (row < end) & (channel < channels)
        grad = widen(tl.load(grad_ptr + at, mask=exists, other=0))
        x = load_biased(x_ptr, bias_ptr, at, exists, channel, channels)
        grad *= gelu_derivative(x, TANH)
        tl.store(grad_x_ptr + at, narrow(grad, dtype), mask=exists)
        if partials_ptr is not None:
            total += grad
        first += ROWS
    if partials_ptr is not None:
        # The first row of the tile stores it, so that no thread has to wait for another.
        here = (tl.arange(0, ROWS)[:, None] == 0) & (channel < channels)
        total = tl.sum(total, 0, keep_dims=True) + tl.zeros_like(total)
        tl.store(partials_ptr + index.to(tl.int64) * channels + channel, total, mask=here)
