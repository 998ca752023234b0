"""The Triton kernels of attention whose programs have all tokens of a head, at most 64.

Everything is read once: bias, norm and rotation are inside, and the backward computes the scores
once. Heads lie in halves, as a rotation needs them: pieces are those of either half, and a tile has
both halves of the first piece, then of the next. A product over channels does not care about their
order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_support.arithmetic import narrow, widen
from .triton_tokens import (
    LOG2_E,
    dot_channels,
    dot_tokens,
    load_piece,
    row_sums,
    scale_rows,
    token_starts,
    zeros_like,
)


@triton.jit
def load_halves(start, TILE: tl.constexpr):
    """Return a tile of what begins at `start` (BLOCK, 1), or one row, in halves and widened."""
    HALF: tl.constexpr = (TILE.dim + 1) // 2
    tile = ()
    for i in tl.static_range(len(TILE.pieces)):
        first = load_piece(start, TILE.pieces[i][0], TILE.pieces[i][1], HALF)
        second = load_piece(start + HALF, TILE.pieces[i][0], TILE.pieces[i][1], TILE.dim - HALF)
        tile = tile + (widen(first), widen(second))
    return tile


@triton.jit
def store_halves(start, exists, tile, TILE: tl.constexpr):
    """Write a tile in halves."""
    HALF: tl.constexpr = (TILE.dim + 1) // 2
    for i in tl.static_range(len(tile)):
        first = i % 2 * HALF
        end = TILE.dim - HALF if i % 2 else HALF
        column = TILE.pieces[i // 2][0] + tl.arange(0, TILE.pieces[i // 2][1])[None, :]
        value = narrow(tile[i], start.dtype.element_ty)
        tl.store(start + first + column, value, mask=exists & (column < end))


@triton.jit
def load_raw(x, bias_ptr, index, token, extent, TILE: tl.constexpr):
    """Return a tile of q, k or v and its bias, in halves and widened."""
    tile = load_halves(token_starts(x, index, token, extent, TILE), TILE)
    if bias_ptr is None:
        return tile
    else:
        bias, result = load_halves(bias_ptr + index % extent[1] * TILE.dim, TILE), ()
        for i in tl.static_range(len(tile)):
            result = result + (tile[i] + bias[i],)
        return result


@triton.jit
def rounded(tile, dtype: tl.constexpr):
    """Return a tile as operands of products."""
    result = ()
    for i in tl.static_range(len(tile)):
        result = result + (narrow(tile[i], dtype),)
    return result


@triton.jit
def normalised(raw, eps, TILE: tl.constexpr):
    """Return a tile times 1 / sqrt(mean(x * x) + eps) of each token, and that (BLOCK,)."""
    squares = row_sums(raw, raw) * (1 / TILE.dim)
    rrms = tl.rsqrt(squares + tl.full((), eps, squares.dtype))
    return scale_rows(raw, rrms), rrms


@triton.jit
def rotated(tile, rope_ptr, token, extent, SIGN: tl.constexpr, TILE: tl.constexpr):
    """Return a tile rotated by the angles of its tokens, forwards (SIGN = 1) or back (-1)."""
    HALF: tl.constexpr = TILE.dim // 2
    start, result = rope_ptr + tl.minimum(token, extent[0] - 1)[:, None] * HALF, ()
    for i in tl.static_range(len(TILE.pieces)):
        first, second = tile[2 * i], tile[2 * i + 1]
        cos = load_piece(start, TILE.pieces[i][0], TILE.pieces[i][1], HALF)
        sines = start + extent[0] * HALF
        sin = SIGN * load_piece(sines, TILE.pieces[i][0], TILE.pieces[i][1], HALF)
        result = result + (first * cos - second * sin, second * cos + first * sin)
    return result


@triton.jit
def prepared(x, bias_ptr, weight_ptr, rope_ptr, index, token, extent, eps, TILE: tl.constexpr):
    """Return a tile of q or k after bias, norm and rotation, rounded."""
    tile = load_raw(x, bias_ptr, index, token, extent, TILE)
    if weight_ptr is not None:
        tile = multiplied(normalised(tile, eps, TILE)[0], load_halves(weight_ptr, TILE))
    if rope_ptr is not None:
        tile = rotated(tile, rope_ptr, token, extent, 1, TILE)
    return rounded(tile, x.ptr.dtype.element_ty)


@triton.jit
def multiplied(x, y):
    """Return the elementwise product of two tiles."""
    result = ()
    for i in tl.static_range(len(x)):
        result = result + (x[i] * y[i],)
    return result


@triton.jit
def head_forward_kernel(
    q,  # Heads (B, N, H, d)
    k,  # Heads (B, N, H, d)
    v,  # Heads (B, N, H, d)
    bias_ptrs,  # three of (H, d), of q, k and v, or absent
    q_weight_ptr,  # (d,) or absent
    k_weight_ptr,  # (d,) or absent
    rope_ptr,  # (2, N, d / 2) or absent
    out,  # Heads (B, N, H, d)
    lse_ptr,  # (B, H, N), absent without a gradient
    extent,  # (N, H)
    eps,
    TILE: tl.constexpr,
):
    """Attend all tokens of a head to one another."""
    index, token = tl.program_id(0), tl.arange(0, TILE.block)
    queries = prepared(q, bias_ptrs[0], q_weight_ptr, rope_ptr, index, token, extent, eps, TILE)
    keys = prepared(k, bias_ptrs[1], k_weight_ptr, rope_ptr, index, token, extent, eps, TILE)
    values = rounded(load_raw(v, bias_ptrs[2], index, token, extent, TILE), v.ptr.dtype.element_ty)
    scores = dot_channels(queries, keys) * (TILE.dim**-0.5 * LOG2_E)
    if TILE.masked:
        scores = tl.where(token[None, :] < extent[0], scores, -float("inf"))
    row_max = tl.max(scores, 1)
    p = tl.exp2(scores - row_max[:, None])
    row_sum = tl.sum(p, 1)
    acc = dot_tokens(p, values, zeros_like(values, scores.dtype))
    exists = token < extent[0]
    start = token_starts(out, index, token, extent, TILE)
    store_halves(start, exists[:, None], scale_rows(acc, 1 / row_sum), TILE)
    if lse_ptr is not None:
        place = lse_ptr + index.to(tl.int64) * extent[0] + token
        tl.store(place, (row_max + tl.log2(row_sum)) * (1 / LOG2_E), mask=exists)


@triton.jit
def store_sums(sums_ptr, tile, TILE: tl.constexpr):
    """Write the sums of a tile over its tokens (d,)."""
    sums = ()
    for i in tl.static_range(len(tile)):
        sums = sums + (tl.sum(tile[i], 0)[None, :],)
    store_halves(sums_ptr, True, sums, TILE)


@triton.jit
def norm_backward(grad, raw, weight_ptr, sums_ptr, eps, TILE: tl.constexpr):
    """Return the gradient of what was normed, and write that of the weight."""
    x, rrms = normalised(raw, eps, TILE)
    store_sums(sums_ptr, multiplied(grad, x), TILE)
    grad = multiplied(grad, load_halves(weight_ptr, TILE))
    along, result = row_sums(grad, x)[:, None] * (1 / TILE.dim), ()
    for i in tl.static_range(len(grad)):
        result = result + ((grad[i] - x[i] * along) * rrms[:, None],)
    return result


@triton.jit
def finish(
    grad, grad_x, x, bias_ptr, weight_ptr, rope_ptr, bias_sums_ptr, weight_sums_ptr, index, token,
    extent, eps, TILE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of q, k or v from that of what it was prepared to.

    It is zero beyond the last token. The sums (d,) are this head's part of the gradients of bias
    and weight.
    """
    # What follows shall not be loaded before the products are done, for want of registers.
    tl.debug_barrier()
    if rope_ptr is not None:
        grad = rotated(grad, rope_ptr, token, extent, -1, TILE)
    if weight_ptr is not None:
        raw = load_raw(x, bias_ptr, index, token, extent, TILE)
        grad = norm_backward(grad, raw, weight_ptr, weight_sums_ptr, eps, TILE)
    start = token_starts(grad_x, index, token, extent, TILE)
    store_halves(start, (token < extent[0])[:, None], grad, TILE)
    if bias_ptr is not None:
        store_sums(bias_sums_ptr, grad, TILE)


@triton.jit
def head_backward_kernel(
    grad,  # Heads (B, N, H, d)
    q,  # Heads (B, N, H, d)
    k,  # Heads (B, N, H, d)
    v,  # Heads (B, N, H, d)
    bias_ptrs,  # three of (H, d), of q, k and v, or absent
    q_weight_ptr,  # (d,) or absent
    k_weight_ptr,  # (d,) or absent
    rope_ptr,  # (2, N, d / 2) or absent
    out,  # Heads (B, N, H, d)
    lse_ptr,  # (B, H, N)
    grad_q,  # Heads (B, N, H, d)
    grad_k,  # Heads (B, N, H, d)
    grad_v,  # Heads (B, N, H, d)
    sums_ptr,  # (5, B * H, d), of the biases of q, k and v and the weights of q and k
    extent,  # (N, H)
    eps,
    TILE: tl.constexpr,
):
    """Write the gradients of a head."""
    index, token = tl.program_id(0), tl.arange(0, TILE.block)
    sums_ptr += index.to(tl.int64) * TILE.dim
    heads = tl.num_programs(0).to(tl.int64) * TILE.dim
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    queries = prepared(q, bias_ptrs[0], q_weight_ptr, rope_ptr, index, token, extent, eps, TILE)
    keys = prepared(k, bias_ptrs[1], k_weight_ptr, rope_ptr, index, token, extent, eps, TILE)
    values = rounded(load_raw(v, bias_ptrs[2], index, token, extent, TILE), dtype)
    g = load_raw(grad, None, index, token, extent, TILE)
    delta = row_sums(g, load_raw(out, None, index, token, extent, TILE))
    g = rounded(g, dtype)
    place = lse_ptr + index.to(tl.int64) * extent[0] + token
    # Where there is no token lse is infinite, so that its p is zero.
    lse = tl.load(place, mask=token < extent[0], other=float("inf")) * LOG2_E
    # p is keys by queries, so that the gradients of k and v need no transposed operand.
    p = tl.exp2(dot_channels(keys, queries) * (TILE.dim**-0.5 * LOG2_E) - lse[None, :])
    if TILE.masked:
        p = tl.where((token < extent[0])[:, None], p, 0)
    sums = zeros_like(keys, lse_ptr.dtype.element_ty)
    grad_values = dot_tokens(p, g, sums)
    finish(
        grad_values, grad_v, v, bias_ptrs[2], None, None, sums_ptr + 2 * heads, None, index, token,
        extent, eps, TILE,
    )  # fmt: skip
    grad_scores = p * (dot_channels(values, g) - delta[None, :]) * TILE.dim**-0.5
    grad_scores = narrow(grad_scores, dtype)
    grad_queries = dot_tokens(tl.trans(grad_scores), keys, sums)
    finish(
        grad_queries, grad_q, q, bias_ptrs[0], q_weight_ptr, rope_ptr, sums_ptr,
        sums_ptr + 3 * heads, index, token, extent, eps, TILE,
    )  # fmt: skip
    grad_keys = dot_tokens(grad_scores, queries, sums)
    finish(
        grad_keys, grad_k, k, bias_ptrs[1], k_weight_ptr, rope_ptr, sums_ptr + heads,
        sums_ptr + 4 * heads, index, token, extent, eps, TILE,
    )  # fmt: skip
