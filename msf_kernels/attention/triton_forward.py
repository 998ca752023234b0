"""The forward kernel computes softmax(q k^T / sqrt(d)) v of a tile of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_heads import LOG2_E, dot_channels, dot_tokens, load, prepare, store


@triton.jit
def attend(
    state,
    q,
    qkv,
    index,
    begin,
    CHUNKS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Return the state after the keys from `begin` on.

    A state is the largest scaled score of each query (BLOCK_M,), the sum of its p (BLOCK_M,) and
    the sum of p times v, a tile. Without a state these are all keys, and p needs no correction.
    """
    SCALE: tl.constexpr = HEAD_DIM**-0.5 * LOG2_E  # exp(x) is computed as 2 ** (x * log2(e)).
    scores = ()
    for i in tl.static_range(len(CHUNKS)):
        key = begin + CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        chunk = dot_channels(q, prepare(qkv, 1, index, key, HEAD_DIM, PIECES))
        if MASKED and i == len(CHUNKS) - 1:
            chunk = tl.where(key[None, :] < qkv.length, chunk, -float("inf"))
        scores = scores + (chunk,)
    row_max = tl.max(scores[0], 1)
    for i in tl.static_range(1, len(CHUNKS)):
        row_max = tl.maximum(row_max, tl.max(scores[i], 1))
    row_max, row_sum = row_max * SCALE, 0.0
    acc = no_sums(q[0].shape[0], row_max.dtype, PIECES)
    if state is not None:
        row_max = tl.maximum(row_max, state[0])
        shrink = tl.exp2(state[0] - row_max)
        row_sum, acc = state[1] * shrink, scale_rows(state[2], shrink)
    for i in tl.static_range(len(CHUNKS)):
        key = begin + CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        p = tl.exp2(scores[i] * SCALE - row_max[:, None])
        row_sum += tl.sum(p, 1)
        acc = dot_tokens(p, load(qkv, 2, index, key, HEAD_DIM, PIECES), acc)
    return row_max, row_sum, acc


@triton.jit
def no_sums(BLOCK_M: tl.constexpr, dtype: tl.constexpr, PIECES: tl.constexpr):
    """Return a tile of zeros for the sum of p times v."""
    result = ()
    for i in tl.static_range(len(PIECES)):
        result = result + (tl.zeros((BLOCK_M, 2 * PIECES[i][1]), dtype),)
    return result


@triton.jit
def scale_rows(tile, factor):
    """Return every row of a tile times its factor."""
    result = ()
    for i in tl.static_range(len(tile)):
        result = result + (tile[i] * factor[:, None],)
    return result


@triton.jit
def forward_kernel(
    qkv,  # Tokens (B, N, 3 * H * d), with what prepares q and k
    out,  # Tokens (B, N, H * d)
    lse_ptr,  # (B, H, N)
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    REST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend BLOCK_M queries to STEPS times BLOCK_N keys, then to the chunks of keys in REST."""
    tiles = tl.cdiv(qkv.length, BLOCK_M)
    index, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = prepare(qkv, 0, index, token, HEAD_DIM, PIECES)
    state = None
    if STEPS > 0:
        dtype: tl.constexpr = lse_ptr.dtype.element_ty
        row_max, row_sum = tl.full((BLOCK_M,), -float("inf"), dtype), tl.zeros((BLOCK_M,), dtype)
        state = row_max, row_sum, no_sums(BLOCK_M, dtype, PIECES)
        for step in range(STEPS):
            chunks: tl.constexpr = ((0, BLOCK_N),)
            state = attend(state, q, qkv, index, step * BLOCK_N, chunks, False, HEAD_DIM, PIECES)
    if len(REST) > 0:
        state = attend(state, q, qkv, index, STEPS * BLOCK_N, REST, MASKED, HEAD_DIM, PIECES)
    row_max, row_sum, acc = state
    store(out, 0, index, token, scale_rows(acc, 1 / row_sum), HEAD_DIM, PIECES)
    place = lse_ptr + index.to(tl.int64) * qkv.length + token
    tl.store(place, (row_max + tl.log2(row_sum)) * (1 / LOG2_E), mask=token < qkv.length)
