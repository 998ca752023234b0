"""The Triton kernels of qk_norm_rope: how tiles of heads are read, normed, rotated and written.

A tile is ROWS heads, counted (B, N, H), by half a head. The two halves of a head are two tiles, so
that the pairs (i, i + d / 2) that RoPE rotates lie in one place of both:

    first     0     | 1         | ...    (ROWS, WIDTH), WIDTH the power of 2 from d / 2 on
    second    d / 2 | d / 2 + 1 | ...    (ROWS, WIDTH)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..triton_support.arithmetic import divide, narrow, widen


class Heads(NamedTuple):
    """Heads (B, N, H, d) are their memory and strides, from head to head in UNITs of elements.

    Triton knows of a number whether it is a multiple of 16, which 72 is not; of a product with UNIT
    it knows UNIT, and reads 8 bytes at once.
    """

    ptr: Any
    batch: int
    token: int
    head: int
    element: int


@triton.jit
def own_heads(index, extent, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the heads of tile ``index`` (batch, token, head), and elements of their first half."""
    row = index * ROWS + tl.arange(0, ROWS)[:, None]
    _, tokens, heads = extent
    return row // heads // tokens, row // heads % tokens, row % heads, tl.arange(0, WIDTH)[None, :]


@triton.jit
def places(x, tile, extent, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return where the two halves of the heads lie, and which of their elements exist."""
    batch, token, head, i = tile
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    start = batch.to(tl.int64) * x.batch + token.to(tl.int64) * x.token + head.to(tl.int64) * x.head
    first = x.ptr + start * UNIT + i.to(tl.int64) * x.element
    exists = batch < extent[0]
    second = first + tl.full((), half, tl.int64) * x.element
    return first, second, exists & (i < half), exists & (half + i < HEAD_DIM)


@triton.jit
def load_heads(x, tile, extent, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the two halves of the heads, widened; 0 where nothing exists."""
    first, second, exists, paired = places(x, tile, extent, UNIT, HEAD_DIM)
    first, second = tl.load(first, mask=exists, other=0), tl.load(second, mask=paired, other=0)
    return widen(first), widen(second)


@triton.jit
def store_heads(x, tile, extent, first, second, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write the two halves of the heads."""
    to_first, to_second, exists, paired = places(x, tile, extent, UNIT, HEAD_DIM)
    tl.store(to_first, narrow(first, x.ptr.dtype.element_ty), mask=exists)
    tl.store(to_second, narrow(second, x.ptr.dtype.element_ty), mask=paired)


@triton.jit
def load_weight(weight_ptr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the two halves (1, WIDTH) of a norm weight, widened."""
    i, half = tl.arange(0, WIDTH)[None, :], (HEAD_DIM + 1) // 2
    first = tl.load(weight_ptr + i, mask=i < half, other=0)
    return widen(first), widen(tl.load(weight_ptr + half + i, mask=half + i < HEAD_DIM, other=0))


@triton.jit
def load_raw(x, bias_ptr, tile, extent, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the two halves of the heads with their bias (H, d), widened."""
    first, second = load_heads(x, tile, extent, UNIT, HEAD_DIM)
    if bias_ptr is not None:
        batch, _, head, i = tile
        at, half = head * HEAD_DIM + i, (HEAD_DIM + 1) // 2
        exists = batch < extent[0]
        first += widen(tl.load(bias_ptr + at, mask=exists & (i < half), other=0))
        paired = exists & (half + i < HEAD_DIM)
        second += widen(tl.load(bias_ptr + half + at, mask=paired, other=0))
    return first, second


@triton.jit
def rotate(first, second, rope_ptr, tile, extent, SIGN: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rotate heads by the angles of their tokens, forwards (SIGN = 1) or back (-1)."""
    batch, token, _, i = tile
    half: tl.constexpr = HEAD_DIM // 2
    cosines, exists = rope_ptr + token * half + i, (batch < extent[0]) & (i < half)
    cos = tl.load(cosines, mask=exists, other=1)
    sin = SIGN * tl.load(cosines + extent[1] * half, mask=exists, other=0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def mean(x, HEAD_DIM: tl.constexpr):
    """Return the mean of each head, whose two halves are already added."""
    return divide(tl.sum(x, 1)[:, None], tl.full((), HEAD_DIM, x.dtype))


@triton.jit
def reciprocal_rms(first, second, eps, HEAD_DIM: tl.constexpr):
    """Return 1 / sqrt(mean(x * x) + eps) of each head (ROWS, 1)."""
    squares = mean(first * first + second * second, HEAD_DIM)
    return tl.rsqrt(squares + tl.full((), eps, squares.dtype))


@triton.jit
def norm_rope(
    x,  # Heads (B, N, H, d)
    out,  # Heads (B, N, H, d)
    bias_ptr,  # (H, d) or absent
    weight_ptr,  # (d,) or absent
    rope_ptr,  # (2, N, d / 2) or absent
    index,
    extent,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write tile ``index`` of q or k after bias, norm and rotation."""
    tile = own_heads(index, extent, ROWS, WIDTH)
    first, second = load_raw(x, bias_ptr, tile, extent, UNIT, HEAD_DIM)
    if weight_ptr is not None:
        rrms = reciprocal_rms(first, second, eps, HEAD_DIM)
        first_weight, second_weight = load_weight(weight_ptr, WIDTH, HEAD_DIM)
        first, second = first * rrms * first_weight, second * rrms * second_weight
    if rope_ptr is not None:
        first, second = rotate(first, second, rope_ptr, tile, extent, 1, HEAD_DIM)
    store_heads(out, tile, extent, first, second, UNIT, HEAD_DIM)


@triton.jit
def forward_kernel(
    q,  # Heads (B, N, H, d)
    k,  # Heads (B, N, H, d)
    q_out,  # Heads (B, N, H, d)
    k_out,  # Heads (B, N, H, d)
    bias_ptrs,  # three of (H, d), of q, k and v, or absent
    q_weight_ptr,  # (d,) or absent
    k_weight_ptr,  # (d,) or absent
    rope_ptr,  # (2, N, d / 2) or absent
    extent,
    eps: tl.float64,
    count,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Prepare q in the first ``count`` programs, k in the others; extent = (B, N, H)."""
    index = tl.program_id(0)
    if index < count:
        norm_rope(
            q, q_out, bias_ptrs[0], q_weight_ptr, rope_ptr, index, extent, eps,
            ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip
    else:
        norm_rope(
            k, k_out, bias_ptrs[1], k_weight_ptr, rope_ptr, index - count, extent, eps,
            ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip


@triton.jit
def norm_rope_backward(
    grad,  # Heads (B, N, H, d), absent: zeros
    x,  # Heads (B, N, H, d), absent for v
    out,  # Heads (B, N, H, d): the gradient of x
    bias_ptr,  # (H, d) or absent
    weight_ptr,  # (d,) or absent
    bias_partials_ptr,  # (programs, ROWS, d), absent without a bias
    weight_partials_ptr,  # (programs, d), absent without a weight
    rope_ptr,  # (2, N, d / 2) or absent
    index,
    programs,
    extent,
    eps,
    count,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Take the gradient of every ``programs``-th tile from ``index`` on through rotation and norm.

    The gradients of bias and weight are summed in that order; ``programs`` is such that each row of
    the tiles is always of one head. Without weight and rotation this copies.
    """
    dtype = tl.float64 if out.ptr.dtype.element_ty == tl.float64 else tl.float32
    first_sum, second_sum = tl.zeros((1, WIDTH), dtype), tl.zeros((1, WIDTH), dtype)
    first_bias, second_bias = tl.zeros((ROWS, WIDTH), dtype), tl.zeros((ROWS, WIDTH), dtype)
    if weight_ptr is not None:
        first_weight, second_weight = load_weight(weight_ptr, WIDTH, HEAD_DIM)
    at = index
    # Not a range, because the interpreter of Triton 3.6 cannot count one with NumPy 2.4.
    while at < count:
        tile = own_heads(at, extent, ROWS, WIDTH)
        if grad is not None:
            first, second = load_heads(grad, tile, extent, UNIT, HEAD_DIM)
        else:
            first, second = tl.zeros((ROWS, WIDTH), dtype), tl.zeros((ROWS, WIDTH), dtype)
        if rope_ptr is not None:
            first, second = rotate(first, second, rope_ptr, tile, extent, -1, HEAD_DIM)
        if weight_ptr is not None:
            x_first, x_second = load_raw(x, bias_ptr, tile, extent, UNIT, HEAD_DIM)
            # Where there is no head it is 0, because an eps of 0 would leave infinity.
            rrms = reciprocal_rms(x_first, x_second, eps, HEAD_DIM)
            rrms = tl.where(tile[0] < extent[0], rrms, 0)
            x_first, x_second = x_first * rrms, x_second * rrms
            first_sum += tl.sum(first * x_first, 0)[None, :]
            second_sum += tl.sum(second * x_second, 0)[None, :]
            first, second = first * first_weight, second * second_weight
            along = mean(first * x_first + second * x_second, HEAD_DIM)
            first, second = (first - x_first * along) * rrms, (second - x_second * along) * rrms
        store_heads(out, tile, extent, first, second, UNIT, HEAD_DIM)
        if bias_partials_ptr is not None:
            first_bias += first
            second_bias += second
        at += programs
    if bias_partials_ptr is not None:
        row = index * ROWS + tl.arange(0, ROWS)[:, None]
        store_partials(bias_partials_ptr + row * HEAD_DIM, first_bias, second_bias, HEAD_DIM)
    if weight_ptr is not None:
        start = weight_partials_ptr + index * HEAD_DIM
        store_partials(start, first_sum, second_sum, HEAD_DIM)


@triton.jit
def store_partials(start, first, second, HEAD_DIM: tl.constexpr):
    """Write the two halves of rows of sums that start at ``start``."""
    i, half = tl.arange(0, first.shape[1])[None, :], (HEAD_DIM + 1) // 2
    tl.store(start + i, first, mask=i < half)
    tl.store(start + half + i, second, mask=half + i < HEAD_DIM)


@triton.jit
def backward_kernel(
    grad_q,  # Heads (B, N, H, d)
    grad_k,  # Heads (B, N, H, d)
    grad_v,  # Heads (B, N, H, d) or absent
    q,  # Heads (B, N, H, d)
    k,  # Heads (B, N, H, d)
    q_out,  # Heads (B, N, H, d): the gradient of qkv's q
    k_out,  # Heads (B, N, H, d)
    v_out,  # Heads (B, N, H, d)
    bias_ptrs,  # three of (H, d), of q, k and v, or absent
    q_weight_ptr,  # (d,) or absent
    k_weight_ptr,  # (d,) or absent
    bias_partials_ptrs,  # three of (programs, ROWS, d), absent without a bias
    q_partials_ptr,  # (programs, d), absent without a weight
    k_partials_ptr,  # (programs, d), absent without a weight
    rope_ptr,  # (2, N, d / 2) or absent
    programs,
    extent,
    eps: tl.float64,
    count,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Share the ``count`` tiles of q among ``programs`` programs, and those of k and v alike."""
    index = tl.program_id(0)
    if index < programs:
        norm_rope_backward(
            grad_q, q, q_out, bias_ptrs[0], q_weight_ptr, bias_partials_ptrs[0], q_partials_ptr,
            rope_ptr, index, programs, extent, eps, count, ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip
    elif index < 2 * programs:
        norm_rope_backward(
            grad_k, k, k_out, bias_ptrs[1], k_weight_ptr, bias_partials_ptrs[1], k_partials_ptr,
            rope_ptr, index - programs, programs, extent, eps, count, ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip
    else:
        norm_rope_backward(
            grad_v, None, v_out, None, None, bias_partials_ptrs[2], None, None,
            index - 2 * programs, programs, extent, eps, count, ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip
