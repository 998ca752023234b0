"""The backward kernels: the gradients of a tile of queries or of a tile of keys and values, or of
a whole short head.

All compute the probabilities anew from the logsumexp, as FlashAttention (Dao et al., 2022) does.
Programs add nothing to what others have written, so the gradients repeat bit for bit.
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
def load_statistics(grad, out, logsumexp, index, token, DIM: tl.constexpr, PIECES: tl.constexpr):
    """Of these outputs: gradient, its sums of products with them, logsumexp to the base 2."""
    g, o = load(grad, 0, index, token, DIM, PIECES), load(out, 0, index, token, DIM, PIECES)
    row_sums = 0.0
    for i in tl.static_range(len(PIECES)):
        row_sums += tl.sum(widen(g[i]) * widen(o[i]), 1)
    place = logsumexp + index.to(tl.int64) * out.length + token
    # Infinite where there is no token: its probabilities are zero.
    lse = tl.load(place, mask=token < out.length, other=float("inf")) * LOG2_E
    return g, row_sums, lse


@triton.jit
def query_step(
    grad_q,
    q,
    statistics,
    qkv,
    index,
    key,
    MASKED: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The queries' gradient with the part of these keys."""
    grad, row_sums, lse = statistics
    k = prepare(qkv, 1, index, key, DIM, PIECES)
    scores = dot_channels(q, k) * (DIM**-0.5 * LOG2_E)
    if MASKED:
        scores = tl.where(key[None, :] < qkv.length, scores, -float("inf"))
    weights = tl.exp2(scores - lse[:, None]) * DIM**-0.5
    v = load(qkv, 2, index, key, DIM, PIECES)
    grad_scores = weights * (dot_channels(grad, v) - row_sums[:, None])
    return dot_tokens(grad_scores, k, grad_q)


@triton.jit
def key_step(
    grad_kv,
    k,
    v,
    qkv,
    grad,
    out,
    logsumexp,
    index,
    query,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The keys' and values' gradients with the parts of these queries; scores are transposed."""
    grad_k, grad_v = grad_kv
    q = prepare(qkv, 0, index, query, DIM, PIECES)
    g, row_sums, lse = load_statistics(grad, out, logsumexp, index, query, DIM, PIECES)
    weights = tl.exp2(dot_channels(k, q) * (DIM**-0.5 * LOG2_E) - lse[None, :])
    grad_v = dot_tokens(weights, g, grad_v)
    grad_scores = weights * (dot_channels(v, g) - row_sums[None, :]) * DIM**-0.5
    return dot_tokens(grad_scores, q, grad_k), grad_v


@triton.jit
def rotate_back(
    x, token, exists, grad, PIECE: tl.constexpr, PIECES: tl.constexpr, DIM: tl.constexpr
):
    """The gradient of piece PIECE before the rotation, in halves, times `exists` if that is given.

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
    if x.rope is not None:
        cos, sin = angles(x, token, FIRST, WIDTH, DIM)
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
    partial,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    REPEATED: tl.constexpr = False,
):
    """The gradient of q or k before rotation and norm, and the tile's part of its weight's.

    Rows beyond the last token are not stored and must not count for the weight. They are zero,
    unless REPEATED, where they hold the gradient of the last token again.
    """
    exists = (token < qkv.length)[:, None]
    # What follows shall not be loaded before the products are done: there are no registers for it.
    tl.debug_barrier()
    target, halves = rows(grad_qkv, PART, index, token, DIM), ()
    for i in tl.static_range(len(PIECES)):
        counted = exists if REPEATED else None
        halves = halves + rotate_back(qkv, token, counted, grad, i, PIECES, DIM)
    weight = qkv.q_weight if PART == 0 else qkv.k_weight
    if weight is not None:
        raw = rows(qkv, PART, index, token, DIM)
        halves = norm_backward(halves, raw, weight, qkv.eps, partial, DIM, PIECES)
    for i in tl.static_range(len(PIECES)):
        store_halves(target, exists, halves[2 * i], halves[2 * i + 1], PIECES[i][0], DIM)


@triton.jit
def norm_backward(grad, raw, weight, eps, partial, DIM: tl.constexpr, PIECES: tl.constexpr):
    """The gradient of what was normed, in halves; stores the weight's, summed over the tokens."""
    rrms, along, result = reciprocal_rms(raw, eps, DIM, PIECES), 0.0, ()
    for i in tl.static_range(len(PIECES)):
        first, second = load_halves(raw, PIECES[i][0], PIECES[i][1], DIM)
        first_weight, second_weight = load_halves(weight, PIECES[i][0], PIECES[i][1], DIM)
        first, second = grad[2 * i] * first * rrms, grad[2 * i + 1] * second * rrms
        along += tl.sum(first * first_weight + second * second_weight, 1)
        first, second = tl.sum(first, 0)[None, :], tl.sum(second, 0)[None, :]
        store_halves(partial, True, first, second, PIECES[i][0], DIM)
    along = along[:, None] * (1 / DIM)
    for i in tl.static_range(len(PIECES)):
        first, second = load_halves(raw, PIECES[i][0], PIECES[i][1], DIM)
        first_weight, second_weight = load_halves(weight, PIECES[i][0], PIECES[i][1], DIM)
        first = (grad[2 * i] * first_weight - first * rrms * along) * rrms
        second = (grad[2 * i + 1] * second_weight - second * rrms * along) * rrms
        result = result + (first, second)
    return result


@triton.jit
def backward_kernel(
    grad,
    qkv,
    out,
    logsumexp,
    grad_qkv,
    partials,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    REST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Programs 0, 1, ... of a head have tiles of queries, as many after them those of keys."""
    tiles = tl.cdiv(qkv.length, ROWS)
    index, tile = tl.program_id(0) // (2 * tiles), tl.program_id(0) % (2 * tiles)
    token = tile % tiles * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = logsumexp.dtype.element_ty
    other = tl.arange(0, COLUMNS)
    if tile < tiles:
        q = prepare(qkv, 0, index, token, DIM, PIECES)
        own = load_statistics(grad, out, logsumexp, index, token, DIM, PIECES)
        grad_q = zeros_like(q, dtype)
        for i in range(STEPS):
            key = i * COLUMNS + other
            grad_q = query_step(grad_q, q, own, qkv, index, key, False, DIM, PIECES)
        for i in tl.static_range(len(REST)):
            key = STEPS * COLUMNS + REST[i][0] + tl.arange(0, REST[i][1])
            masked: tl.constexpr = MASKED and i == len(REST) - 1
            grad_q = query_step(grad_q, q, own, qkv, index, key, masked, DIM, PIECES)
        # Not before the loop, which has no two registers left to carry the address through.
        partial = partials + tl.program_id(0).to(tl.int64) * DIM
        store_prepared(grad_qkv, qkv, 0, index, token, grad_q, partial, DIM, PIECES)
    else:
        k = prepare(qkv, 1, index, token, DIM, PIECES)
        v = load(qkv, 2, index, token, DIM, PIECES)
        kv = (zeros_like(k, dtype), zeros_like(v, dtype))
        for i in range(STEPS):
            query = i * COLUMNS + other
            kv = key_step(kv, k, v, qkv, grad, out, logsumexp, index, query, DIM, PIECES)
        for i in tl.static_range(len(REST)):
            query = STEPS * COLUMNS + REST[i][0] + tl.arange(0, REST[i][1])
            kv = key_step(kv, k, v, qkv, grad, out, logsumexp, index, query, DIM, PIECES)
        store(grad_qkv, 2, index, token, kv[1], DIM, PIECES)
        partial = partials + tl.program_id(0).to(tl.int64) * DIM
        store_prepared(grad_qkv, qkv, 1, index, token, kv[0], partial, DIM, PIECES, True)


@triton.jit
def head_backward_kernel(
    grad,
    qkv,
    out,
    logsumexp,
    grad_qkv,
    partials,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program has all tokens of a head, so that everything is read and computed once."""
    index, token = tl.program_id(0), tl.arange(0, ROWS)
    q = prepare(qkv, 0, index, token, DIM, PIECES)
    k = prepare(qkv, 1, index, token, DIM, PIECES)
    v = load(qkv, 2, index, token, DIM, PIECES)
    g, row_sums, lse = load_statistics(grad, out, logsumexp, index, token, DIM, PIECES)
    # Of keys by queries, as in key_step; here keys beyond the last would be seen by grad_q.
    weights = tl.exp2(dot_channels(k, q) * (DIM**-0.5 * LOG2_E) - lse[None, :])
    weights = tl.where((token < qkv.length)[:, None], weights, 0)
    dtype: tl.constexpr = logsumexp.dtype.element_ty
    store(grad_qkv, 2, index, token, dot_tokens(weights, g, zeros_like(v, dtype)), DIM, PIECES)
    grad_scores = weights * (dot_channels(v, g) - row_sums[None, :]) * DIM**-0.5
    grad_scores = narrow(grad_scores, q[0].dtype)
    partial = partials + index.to(tl.int64) * (2 * DIM)
    grad_q = dot_tokens(tl.trans(grad_scores), k, zeros_like(q, dtype))
    store_prepared(grad_qkv, qkv, 0, index, token, grad_q, partial, DIM, PIECES)
    grad_k = dot_tokens(grad_scores, q, zeros_like(k, dtype))
    store_prepared(grad_qkv, qkv, 1, index, token, grad_k, partial + DIM, DIM, PIECES)
