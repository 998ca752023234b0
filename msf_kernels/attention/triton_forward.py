"""The forward kernel: softmax(q k^T / sqrt(d)) v of a tile of queries."""

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
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The state after the keys from `begin` on: the largest score, the sum of weights, the weighted
    sum of v. Without a state these are all keys, so the weights need no correction.
    """
    SCALE: tl.constexpr = DIM**-0.5 * LOG2_E  # of scores of which 2 ** is taken
    scores = ()
    for i in tl.static_range(len(CHUNKS)):
        key = begin + CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        chunk = dot_channels(q, prepare(qkv, 1, index, key, DIM, PIECES))
        if MASKED and i == len(CHUNKS) - 1:
            chunk = tl.where(key[None, :] < qkv.length, chunk, -float("inf"))
        scores = scores + (chunk,)
    largest = tl.max(scores[0], 1)
    for i in tl.static_range(1, len(CHUNKS)):
        largest = tl.maximum(largest, tl.max(scores[i], 1))
    largest, total = largest * SCALE, 0.0
    weighted = no_sums(q[0].shape[0], largest.dtype, PIECES)
    if state is not None:
        largest = tl.maximum(largest, state[0])
        shrink = tl.exp2(state[0] - largest)
        total, weighted = state[1] * shrink, times(state[2], shrink)
    for i in tl.static_range(len(CHUNKS)):
        key = begin + CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        weights = tl.exp2(scores[i] * SCALE - largest[:, None])
        total += tl.sum(weights, 1)
        weighted = dot_tokens(weights, load(qkv, 2, index, key, DIM, PIECES), weighted)
    return largest, total, weighted


@triton.jit
def no_sums(ROWS: tl.constexpr, dtype: tl.constexpr, PIECES: tl.constexpr):
    result = ()
    for i in tl.static_range(len(PIECES)):
        result = result + (tl.zeros((ROWS, 2 * PIECES[i][1]), dtype),)
    return result


@triton.jit
def times(tile, factor):
    """Every row of a tile times its factor."""
    result = ()
    for i in tl.static_range(len(tile)):
        result = result + (tile[i] * factor[:, None],)
    return result


@triton.jit
def forward_kernel(
    qkv,
    out,
    logsumexp,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    REST: tl.constexpr,
    MASKED: tl.constexpr,
):
    tiles = tl.cdiv(qkv.length, ROWS)
    index, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    token = tile * ROWS + tl.arange(0, ROWS)
    q = prepare(qkv, 0, index, token, DIM, PIECES)
    state = None
    if STEPS > 0:
        dtype: tl.constexpr = logsumexp.dtype.element_ty
        largest, total = tl.full((ROWS,), -float("inf"), dtype), tl.zeros((ROWS,), dtype)
        state = largest, total, no_sums(ROWS, dtype, PIECES)
        for step in range(STEPS):
            chunks: tl.constexpr = ((0, COLUMNS),)
            state = attend(state, q, qkv, index, step * COLUMNS, chunks, False, DIM, PIECES)
    if len(REST) > 0:
        state = attend(state, q, qkv, index, STEPS * COLUMNS, REST, MASKED, DIM, PIECES)
    largest, total, weighted = state
    store(out, 0, index, token, times(weighted, 1 / total), DIM, PIECES)
    place = logsumexp + index.to(tl.int64) * qkv.length + token
    tl.store(place, (largest + tl.log2(total)) * (1 / LOG2_E), mask=token < qkv.length)
