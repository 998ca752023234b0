"""The Triton kernels of qk_norm_rope, whose tiles are those of `triton_tiles.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    centre,
    load_heads,
    load_raw,
    load_weight,
    mean,
    own_heads,
    reciprocal_rms,
    rotate,
    store_heads,
    store_partials,
)


@triton.jit
def norm_rope(
    x,  # Heads (B, N, H, d)
    out,  # Heads (B, N, H, d)
    bias_ptr,  # (H, d) or absent
    weight_ptr,  # (d,) or absent
    norm_bias_ptr,  # (d,) or absent
    rope_ptr,  # (2, N, d / 2) or absent
    index,
    extent,
    eps,
    LAYER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write tile ``index`` of q or k after bias, norm and rotation."""
    tile = own_heads(index, extent, ROWS, WIDTH)
    first, second = load_raw(x, bias_ptr, tile, extent, UNIT, HEAD_DIM)
    if weight_ptr is not None:
        if LAYER:
            first, second = centre(first, second, tile, extent, HEAD_DIM)
        rrms = reciprocal_rms(first, second, eps, HEAD_DIM)
        first_weight, second_weight = load_weight(weight_ptr, WIDTH, HEAD_DIM)
        first, second = first * rrms * first_weight, second * rrms * second_weight
    if norm_bias_ptr is not None:
        first_bias, second_bias = load_weight(norm_bias_ptr, WIDTH, HEAD_DIM)
        first, second = first + first_bias, second + second_bias
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
    q_norm_bias_ptr,  # (d,) or absent
    k_norm_bias_ptr,  # (d,) or absent
    rope_ptr,  # (2, N, d / 2) or absent
    extent,
    eps: tl.float64,
    count,
    LAYER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Prepare q in the first ``count`` programs, k in the others; extent = (B, N, H)."""
    index = tl.program_id(0)
    if index < count:
        norm_rope(
            q, q_out, bias_ptrs[0], q_weight_ptr, q_norm_bias_ptr, rope_ptr, index,
            extent, eps, LAYER, ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip
    else:
        norm_rope(
            k, k_out, bias_ptrs[1], k_weight_ptr, k_norm_bias_ptr, rope_ptr, index - count,
            extent, eps, LAYER, ROWS, WIDTH, UNIT, HEAD_DIM,
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
    norm_bias_partials_ptr,  # (programs, d), absent without a bias of the norm
    rope_ptr,  # (2, N, d / 2) or absent
    index,
    programs,
    extent,
    eps,
    count,
    LAYER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Take the gradient of every ``programs``-th tile from ``index`` on through rotation and norm.

    The gradients of biases and weight are summed in that order; ``programs`` is such that each row
    of the tiles is always of one head. Without weight and rotation this copies.
    """
    dtype = tl.float64 if out.ptr.dtype.element_ty == tl.float64 else tl.float32
    first_sum, second_sum = tl.zeros((1, WIDTH), dtype), tl.zeros((1, WIDTH), dtype)
    first_norm_bias, second_norm_bias = tl.zeros((1, WIDTH), dtype), tl.zeros((1, WIDTH), dtype)
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
        if norm_bias_partials_ptr is not None:
            first_norm_bias += tl.sum(first, 0)[None, :]
            second_norm_bias += tl.sum(second, 0)[None, :]
        if weight_ptr is not None:
            x_first, x_second = load_raw(x, bias_ptr, tile, extent, UNIT, HEAD_DIM)
            if LAYER:
                x_first, x_second = centre(x_first, x_second, tile, extent, HEAD_DIM)
            # Where there is no head it is 0, because an eps of 0 would leave infinity.
            rrms = reciprocal_rms(x_first, x_second, eps, HEAD_DIM)
            rrms = tl.where(tile[0] < extent[0], rrms, 0)
            x_first, x_second = x_first * rrms, x_second * rrms
            first_sum += tl.sum(first * x_first, 0)[None, :]
            second_sum += tl.sum(second * x_second, 0)[None, :]
            first, second = first * first_weight, second * second_weight
            along = mean(first * x_first + second * x_second, HEAD_DIM)
            first, second = (first - x_first * along) * rrms, (second - x_second * along) * rrms
            if LAYER:
                first, second = centre(first, second, tile, extent, HEAD_DIM)
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
    if norm_bias_partials_ptr is not None:
        start = norm_bias_partials_ptr + index * HEAD_DIM
        store_partials(start, first_norm_bias, second_norm_bias, HEAD_DIM)


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
    rope_ptr,  # (2, N, d / 2) or absent
    bias_partials_ptrs,  # three of (programs, ROWS, d), absent without a bias
    q_weight_partials_ptr,  # (programs, d), absent without a weight
    k_weight_partials_ptr,  # (programs, d), absent without a weight
    q_norm_bias_partials_ptr,  # (programs, d), absent without a bias of the norm
    k_norm_bias_partials_ptr,  # (programs, d), absent without a bias of the norm
    programs,
    extent,
    eps: tl.float64,
    count,
    LAYER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Share the ``count`` tiles of q among ``programs`` programs, and those of k and v alike."""
    index = tl.program_id(0)
    if index < programs:
        norm_rope_backward(
            grad_q, q, q_out, bias_ptrs[0], q_weight_ptr, bias_partials_ptrs[0],
            q_weight_partials_ptr, q_norm_bias_partials_ptr, rope_ptr, index, programs,
            extent, eps, count, LAYER, ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip
    elif index < 2 * programs:
        norm_rope_backward(
            grad_k, k, k_out, bias_ptrs[1], k_weight_ptr, bias_partials_ptrs[1],
            k_weight_partials_ptr, k_norm_bias_partials_ptr, rope_ptr, index - programs, programs,
            extent, eps, count, LAYER, ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip
    else:
        norm_rope_backward(
            grad_v, None, v_out, None, None, bias_partials_ptrs[2],
            None, None, None, index - 2 * programs, programs,
            extent, eps, count, LAYER, ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip
