"""The backward kernels write the gradients of a tile of queries, of keys and values, or of a head.

All compute the probabilities p anew from lse, as FlashAttention (Dao et al., 2022) does. Programs
add nothing to what others have written, so the gradients repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_support.arithmetic import narrow, widen
from .triton_heads import (
    LOG2_E,
    angles,
    dot_channels,
    dot_tokens,
    load,
    load_halves,
    prepare,
    reciprocal_rms,
    rows,
    store,
    store_halves,
    zeros_like,
)


@triton.jit
def load_grad_delta_lse(
    grad_out, out, lse_ptr, index, token, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr
):
    """Return a tile of grad_out, its delta (BLOCK,), and lse (BLOCK,) to the base 2."""
    g = load(grad_out, 0, index, token, HEAD_DIM, PIECES)
    o = load(out, 0, index, token, HEAD_DIM, PIECES)
    delta = 0.0
    for i in tl.static_range(len(PIECES)):
        delta += tl.sum(widen(g[i]) * widen(o[i]), 1)
    place = lse_ptr + index.to(tl.int64) * out.length + token
    # Where there is no token lse is infinite, so that its p is zero.
    lse = tl.load(place, mask=token < out.length, other=float("inf")) * LOG2_E
    return g, delta, lse


@triton.jit
def query_step(
    grad_q,
    q,
    grad_delta_lse,
    qkv,
    index,
    key,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Return the gradient of the queries with the part of these keys added."""
    g, delta, lse = grad_delta_lse
    k = prepare(qkv, 1, index, key, HEAD_DIM, PIECES)
    scores = dot_channels(q, k) * (HEAD_DIM**-0.5 * LOG2_E)
    if MASKED:
        scores = tl.where(key[None, :] < qkv.length, scores, -float("inf"))
    scaled_p = tl.exp2(scores - lse[:, None]) * HEAD_DIM**-0.5
    v = load(qkv, 2, index, key, HEAD_DIM, PIECES)
    grad_scores = scaled_p * (dot_channels(g, v) - delta[:, None])
    return dot_tokens(grad_scores, k, grad_q)


@triton.jit
def key_step(
    grad_kv,
    k,
    v,
    qkv,
    grad_out,
    out,
    lse_ptr,
    index,
    query,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Return the gradients of keys and values with the parts of these queries added.

    Scores and p are transposed here, keys by queries.
    """
    grad_k, grad_v = grad_kv
    q = prepare(qkv, 0, index, query, HEAD_DIM, PIECES)
    g, delta, lse = load_grad_delta_lse(grad_out, out, lse_ptr, index, query, HEAD_DIM, PIECES)
    p = tl.exp2(dot_channels(k, q) * (HEAD_DIM**-0.5 * LOG2_E) - lse[None, :])
    grad_v = dot_tokens(p, g, grad_v)
    grad_scores = p * (dot_channels(v, g) - delta[None, :]) * HEAD_DIM**-0.5
    return dot_tokens(grad_scores, q, grad_k), grad_v


@triton.jit
def rotate_back(
    x, token, exists, grad, PIECE: tl.constexpr, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Return the gradient of piece PIECE before the rotation, in halves, times `exists` if given.

    The factor of 0 or 1 must not become a select between the gradient and zero: the gradient is the
    accumulator of a product, and ptxas 12.8 and 12.9 take such a select for zero in every row, and
    with it the product. The audit finds one.
    """
    FIRST: tl.constexpr = PIECES[PIECE][0]
    WIDTH: tl.constexpr = PIECES[PIECE][1]
    at: tl.constexpr = PIECE if PIECES[0][2] else 2 * PIECE
    if PIECES[PIECE][2]:
        first, second = tl.split(tl.reshape(grad[at], (token.shape[0], WIDTH, 2)))
    else:
        first, second = grad[at], grad[at + 1]
    if exists is not None:
        exists = exists.to(first.dtype)
        first, second = first * exists, second * exists
    if x.rope_ptr is not None:
        cos, sin = angles(x, token, FIRST, WIDTH, HEAD_DIM)
        first, second = first * cos + second * sin, second * cos - first * sin
    return first, second


@triton.jit
def store_prepared(
    grad_qkv,
    qkv,
    PART: tl.constexpr,
    index,
    token,
    grad,
    partial_ptr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    REPEATED: tl.constexpr = False,
):
    """Write the gradient of q or k before norm and rotation, and the tile's part of its weight's.

    Rows beyond the last token are not stored and must not count for the weight. They are zero,
    unless REPEATED, where they hold the gradient of the last token again.
    """
    exists = (token < qkv.length)[:, None]
    # What follows shall not be loaded before the products are done, for want of registers.
    tl.debug_barrier()
    target, halves = rows(grad_qkv, PART, index, token, HEAD_DIM), ()
    for i in tl.static_range(len(PIECES)):
        counted = exists if REPEATED else None
        halves = halves + rotate_back(qkv, token, counted, grad, i, PIECES, HEAD_DIM)
    weight_ptr = qkv.q_weight_ptr if PART == 0 else qkv.k_weight_ptr
    if weight_ptr is not None:
        raw = rows(qkv, PART, index, token, HEAD_DIM)
        halves = norm_backward(halves, raw, weight_ptr, qkv.eps, partial_ptr, HEAD_DIM, PIECES)
    for i in tl.static_range(len(PIECES)):
        store_halves(target, exists, halves[2 * i], halves[2 * i + 1], PIECES[i][0], HEAD_DIM)


@triton.jit
def norm_backward(
    grad, raw, weight_ptr, eps, partial_ptr, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr
):
    """Return the gradient of what was normed, in halves; write the weight's, summed over tokens."""
    rrms, along, result = reciprocal_rms(raw, eps, HEAD_DIM, PIECES), 0.0, ()
    for i in tl.static_range(len(PIECES)):
        first, second = load_halves(raw, PIECES[i][0], PIECES[i][1], HEAD_DIM)
        first_weight, second_weight = load_halves(weight_ptr, PIECES[i][0], PIECES[i][1], HEAD_DIM)
        first, second = grad[2 * i] * first * rrms, grad[2 * i + 1] * second * rrms
        along += tl.sum(first * first_weight + second * second_weight, 1)
        first, second = tl.sum(first, 0)[None, :], tl.sum(second, 0)[None, :]
        store_halves(partial_ptr, True, first, second, PIECES[i][0], HEAD_DIM)
    along = along[:, None] * (1 / HEAD_DIM)
    for i in tl.static_range(len(PIECES)):
        first, second = load_halves(raw, PIECES[i][0], PIECES[i][1], HEAD_DIM)
        first_weight, second_weight = load_halves(weight_ptr, PIECES[i][0], PIECES[i][1], HEAD_DIM)
        first = (grad[2 * i] * first_weight - first * rrms * along) * rrms
        second = (grad[2 * i + 1] * second_weight - second * rrms * along) * rrms
        result = result + (first, second)
    return result


@triton.jit
def backward_kernel(
    grad_out,  # Tokens (B, N, H * d)
    qkv,  # Tokens (B, N, 3 * H * d), with what prepares q and k
    out,  # Tokens (B, N, H * d)
    lse_ptr,  # (B, H, N)
    grad_qkv,  # Tokens (B, N, 3 * H * d)
    partials_ptr,  # (B * H, 2, tiles, d) for the gradients of q_weight and k_weight
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    REST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Give the first half of a head's programs tiles of queries, the second half those of keys.

    Programs with BLOCK_M queries go through the keys in steps of BLOCK_N; those with BLOCK_M keys
    go through the queries in the same steps.
    """
    tiles = tl.cdiv(qkv.length, BLOCK_M)
    index, tile = tl.program_id(0) // (2 * tiles), tl.program_id(0) % (2 * tiles)
    token = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    other = tl.arange(0, BLOCK_N)
    if tile < tiles:
        q = prepare(qkv, 0, index, token, HEAD_DIM, PIECES)
        own = load_grad_delta_lse(grad_out, out, lse_ptr, index, token, HEAD_DIM, PIECES)
        grad_q = zeros_like(q, dtype)
        for i in range(STEPS):
            key = i * BLOCK_N + other
            grad_q = query_step(grad_q, q, own, qkv, index, key, False, HEAD_DIM, PIECES)
        for i in tl.static_range(len(REST)):
            key = STEPS * BLOCK_N + REST[i][0] + tl.arange(0, REST[i][1])
            masked: tl.constexpr = MASKED and i == len(REST) - 1
            grad_q = query_step(grad_q, q, own, qkv, index, key, masked, HEAD_DIM, PIECES)
        # The loop has no two registers left to carry this address through.
        partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM
        store_prepared(grad_qkv, qkv, 0, index, token, grad_q, partial_ptr, HEAD_DIM, PIECES)
    else:
        k = prepare(qkv, 1, index, token, HEAD_DIM, PIECES)
        v = load(qkv, 2, index, token, HEAD_DIM, PIECES)
        kv = (zeros_like(k, dtype), zeros_like(v, dtype))
        for i in range(STEPS):
            query = i * BLOCK_N + other
            kv = key_step(kv, k, v, qkv, grad_out, out, lse_ptr, index, query, HEAD_DIM, PIECES)
        for i in tl.static_range(len(REST)):
            query = STEPS * BLOCK_N + REST[i][0] + tl.arange(0, REST[i][1])
            kv = key_step(kv, k, v, qkv, grad_out, out, lse_ptr, index, query, HEAD_DIM, PIECES)
        store(grad_qkv, 2, index, token, kv[1], HEAD_DIM, PIECES)
        partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM
        store_prepared(grad_qkv, qkv, 1, index, token, kv[0], partial_ptr, HEAD_DIM, PIECES, True)


@triton.jit
def head_backward_kernel(
    grad_out,  # Tokens (B, N, H * d)
    qkv,  # Tokens (B, N, 3 * H * d), with what prepares q and k
    out,  # Tokens (B, N, H * d)
    lse_ptr,  # (B, H, N)
    grad_qkv,  # Tokens (B, N, 3 * H * d)
    partials_ptr,  # (B * H, 2, tiles, d) for the gradients of q_weight and k_weight
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Give a program all tokens of a head, so that everything is read and computed once."""
    index, token = tl.program_id(0), tl.arange(0, BLOCK_M)
    q = prepare(qkv, 0, index, token, HEAD_DIM, PIECES)
    k = prepare(qkv, 1, index, token, HEAD_DIM, PIECES)
    v = load(qkv, 2, index, token, HEAD_DIM, PIECES)
    g, delta, lse = load_grad_delta_lse(grad_out, out, lse_ptr, index, token, HEAD_DIM, PIECES)
    # p is keys by queries, as in key_step; here grad_q would see the keys beyond the last.
    p = tl.exp2(dot_channels(k, q) * (HEAD_DIM**-0.5 * LOG2_E) - lse[None, :])
    p = tl.where((token < qkv.length)[:, None], p, 0)
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    store(grad_qkv, 2, index, token, dot_tokens(p, g, zeros_like(v, dtype)), HEAD_DIM, PIECES)
    grad_scores = p * (dot_channels(v, g) - delta[None, :]) * HEAD_DIM**-0.5
    grad_scores = narrow(grad_scores, q[0].dtype)
    partial_ptr = partials_ptr + index.to(tl.int64) * (2 * HEAD_DIM)
    grad_q = dot_tokens(tl.trans(grad_scores), k, zeros_like(q, dtype))
    store_prepared(grad_qkv, qkv, 0, index, token, grad_q, partial_ptr, HEAD_DIM, PIECES)
    grad_k = dot_tokens(grad_scores, q, zeros_like(k, dtype))
    store_prepared(grad_qkv, qkv, 1, index, token, grad_k, partial_ptr + HEAD_DIM, HEAD_DIM, PIECES)
