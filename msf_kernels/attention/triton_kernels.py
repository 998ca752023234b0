"""The Triton kernels of attention, forward and backward, of q, k and v of any number of tokens.

They are those of FlashAttention-2 (Dao, 2023): a program owns a tile of tokens and goes through the
others in steps, whose loads the compiler starts some steps ahead. Tokens that are no whole step
come last: 272 = 4 * 64 + 16. The backward computes the probabilities p anew from lse. No program
adds to what others have written, so the gradients repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tokens import (
    LOG2_E,
    dot_channels,
    dot_tokens,
    load,
    row_sums,
    scale_rows,
    store,
    zeros_like,
)


@triton.jit
def own_tile(extent, KINDS: tl.constexpr, TILE: tl.constexpr):
    """Return the head of this program, which of KINDS kinds it is, and its tokens."""
    tiles = tl.cdiv(extent[0], TILE.block)
    program, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    return program // KINDS, program % KINDS, tile * TILE.block + tl.arange(0, TILE.block)


@triton.jit
def attend(state, q, k, v, index, key, extent, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Return the state of a tile of queries after these keys.

    A state is the largest scaled score of each query (BLOCK,), the sum of its p (BLOCK,) and the
    sum of p times v, a tile.
    """
    SCALE: tl.constexpr = TILE.dim**-0.5 * LOG2_E  # exp(x) is computed as 2 ** (x * log2(e)).
    scores = dot_channels(q, load(k, index, key, extent, TILE))
    if MASKED:
        scores = tl.where(key[None, :] < extent[0], scores, -float("inf"))
    row_max = tl.maximum(state[0], tl.max(scores, 1) * SCALE)
    p = tl.exp2(scores * SCALE - row_max[:, None])
    shrink = tl.exp2(state[0] - row_max)
    acc = dot_tokens(p, load(v, index, key, extent, TILE), scale_rows(state[2], shrink))
    return row_max, state[1] * shrink + tl.sum(p, 1), acc


@triton.jit
def forward_kernel(
    q,  # Heads (B, N, H, d)
    k,  # Heads (B, N, H, d)
    v,  # Heads (B, N, H, d)
    out,  # Heads (B, N, H, d)
    lse_ptr,  # (B, H, N), absent without a gradient
    extent,  # (N, H)
    TILE: tl.constexpr,
):
    """Attend a tile of queries to the keys of all steps, then to the rest."""
    index, _, token = own_tile(extent, 1, TILE)
    dtype: tl.constexpr = tl.float64 if q.ptr.dtype.element_ty == tl.float64 else tl.float32
    queries = load(q, index, token, extent, TILE)
    BLOCK: tl.constexpr = TILE.block
    row_max = tl.full((BLOCK,), -float("inf"), dtype)
    state = row_max, tl.zeros((BLOCK,), dtype), zeros_like(queries, dtype)
    for i in range(TILE.steps):
        key = i * TILE.step + tl.arange(0, TILE.step)
        state = attend(
            state, queries, k, v, index, key, extent, TILE.masked and TILE.rest == 0, TILE
        )
    if TILE.rest > 0:
        key = TILE.steps * TILE.step + tl.arange(0, TILE.rest)
        state = attend(state, queries, k, v, index, key, extent, TILE.masked, TILE)
    row_max, row_sum, acc = state
    store(out, index, token, scale_rows(acc, 1 / row_sum), extent, TILE)
    if lse_ptr is not None:
        place = lse_ptr + index.to(tl.int64) * extent[0] + token
        tl.store(place, (row_max + tl.log2(row_sum)) * (1 / LOG2_E), mask=token < extent[0])


@triton.jit
def delta_kernel(
    grad,  # Heads (B, N, H, d)
    out,  # Heads (B, N, H, d)
    delta_ptr,  # (B, H, N)
    extent,  # (N, H)
    TILE: tl.constexpr,
):
    """Write the sums of grad times out over the channels of a tile of tokens."""
    index, _, token = own_tile(extent, 1, TILE)
    g, o = load(grad, index, token, extent, TILE), load(out, index, token, extent, TILE)
    place = delta_ptr + index.to(tl.int64) * extent[0] + token
    tl.store(place, row_sums(g, o), mask=token < extent[0])


@triton.jit
def load_rows(lse_ptr, delta_ptr, index, query, extent):
    """Return lse to the base 2, infinite where there is no query so that p is 0, and delta."""
    place, exists = index.to(tl.int64) * extent[0] + query, query < extent[0]
    lse = tl.load(lse_ptr + place, mask=exists, other=float("inf")) * LOG2_E
    return lse, tl.load(delta_ptr + place, mask=exists, other=0)


@triton.jit
def query_step(
    sums, q, g, rows, k, v, index, key, extent, MASKED: tl.constexpr, TILE: tl.constexpr
):
    """Return the gradient of the queries with the part of these keys added."""
    keys = load(k, index, key, extent, TILE)
    scores = dot_channels(q, keys) * (TILE.dim**-0.5 * LOG2_E)
    if MASKED:
        scores = tl.where(key[None, :] < extent[0], scores, -float("inf"))
    scaled_p = tl.exp2(scores - rows[0][:, None]) * TILE.dim**-0.5
    products = dot_channels(g, load(v, index, key, extent, TILE))
    return dot_tokens(scaled_p * (products - rows[1][:, None]), keys, sums)


@triton.jit
def key_step(
    sums, keys, values, q, grad, lse_ptr, delta_ptr, index, query, extent, TILE: tl.constexpr
):
    """Return the gradients of keys and values with the parts of these queries added.

    Scores and p are transposed here, keys by queries.
    """
    queries, g = load(q, index, query, extent, TILE), load(grad, index, query, extent, TILE)
    lse, delta = load_rows(lse_ptr, delta_ptr, index, query, extent)
    p = tl.exp2(dot_channels(keys, queries) * (TILE.dim**-0.5 * LOG2_E) - lse[None, :])
    grad_scores = p * (dot_channels(values, g) - delta[None, :]) * TILE.dim**-0.5
    return dot_tokens(grad_scores, queries, sums[0]), dot_tokens(p, g, sums[1])


@triton.jit
def backward_kernel(
    grad,  # Heads (B, N, H, d)
    q,  # Heads (B, N, H, d)
    k,  # Heads (B, N, H, d)
    v,  # Heads (B, N, H, d)
    lse_ptr,  # (B, H, N)
    delta_ptr,  # (B, H, N)
    grad_q,  # Heads (B, N, H, d)
    grad_k,  # Heads (B, N, H, d)
    grad_v,  # Heads (B, N, H, d)
    extent,  # (N, H)
    TILE: tl.constexpr,
):
    """Give half of a head's programs a tile of queries each, the other half one of keys.

    Either goes through all tokens of the other kind.
    """
    index, kind, token = own_tile(extent, 2, TILE)
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    if kind == 0:
        queries, g = load(q, index, token, extent, TILE), load(grad, index, token, extent, TILE)
        rows, total = load_rows(lse_ptr, delta_ptr, index, token, extent), zeros_like(g, dtype)
        for i in range(TILE.steps):
            key = i * TILE.step + tl.arange(0, TILE.step)
            total = query_step(
                total,
                queries,
                g,
                rows,
                k,
                v,
                index,
                key,
                extent,
                TILE.masked and TILE.rest == 0,
                TILE,
            )
        if TILE.rest > 0:
            key = TILE.steps * TILE.step + tl.arange(0, TILE.rest)
            total = query_step(total, queries, g, rows, k, v, index, key, extent, TILE.masked, TILE)
        store(grad_q, index, token, total, extent, TILE)
    else:
        keys, values = load(k, index, token, extent, TILE), load(v, index, token, extent, TILE)
        sums = zeros_like(keys, dtype), zeros_like(keys, dtype)
        for i in range(TILE.steps):
            query = i * TILE.step + tl.arange(0, TILE.step)
            sums = key_step(
                sums, keys, values, q, grad, lse_ptr, delta_ptr, index, query, extent, TILE
            )
        if TILE.rest > 0:
            query = TILE.steps * TILE.step + tl.arange(0, TILE.rest)
            sums = key_step(
                sums, keys, values, q, grad, lse_ptr, delta_ptr, index, query, extent, TILE
            )
        store(grad_k, index, token, sums[0], extent, TILE)
        store(grad_v, index, token, sums[1], extent, TILE)
