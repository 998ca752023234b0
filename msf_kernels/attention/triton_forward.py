"""The forward kernel: softmax(q k^T / sqrt(d)) v of a tile of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_heads import (
    LOG2_E,
    dot_channels,
    dot_tokens,
    load,
    prepare,
    store,
)


@triton.jit
def attend(
    state, q, qkv, index, key, MASKED: tl.constexpr, DIM: tl.constexpr, PIECES: tl.constexpr
):
    """The state after these keys: the largest score, the sum of weights, the weighted sum of v."""
    largest, total, weighted = state
    k = prepare(qkv, 1, index, key, DIM, PIECES)
    scores = dot_channels(q, k) * (DIM**-0.5 * LOG2_E)  # of which 2 ** is taken
    if MASKED:
        scores = tl.where(key[None, :] < qkv.length, scores, -float("inf"))
    now = tl.maximum(largest, tl.max(scores, 1))
    weights, shrink = tl.exp2(scores - now[:, None]), tl.exp2(largest - now)
    total = total * shrink + tl.sum(weights, 1)
    shrunk = ()
    for i in tl.static_range(len(PIECES)):
        shrunk = shrunk + (weighted[i] * shrink[:, None],)
    v = load(qkv, 2, index, key, DIM, PIECES)
    return now, total, dot_tokens(weights, v, shrunk)


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
):
    tiles = tl.cdiv(qkv.length, ROWS)
    index, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    token = tile * ROWS + tl.arange(0, ROWS)
    q = prepare(qkv, 0, index, token, DIM, PIECES)
    dtype: tl.constexpr = logsumexp.dtype.element_ty
    largest, total = tl.full((ROWS,), -float("inf"), dtype), tl.zeros((ROWS,), dtype)
    weighted = ()
    for i in tl.static_range(len(PIECES)):
        weighted = weighted + (tl.zeros((ROWS, 2 * PIECES[i][1]), dtype),)
    state = (largest, total, weighted)
    for step in range(STEPS):
        key = step * COLUMNS + tl.arange(0, COLUMNS)
        state = attend(state, q, qkv, index, key, False, DIM, PIECES)
    if REST:
        key = STEPS * COLUMNS + tl.arange(0, REST)
        state = attend(state, q, qkv, index, key, True, DIM, PIECES)
    largest, total, weighted = state
    result = ()
    for i in tl.static_range(len(PIECES)):
        result = result + (weighted[i] / total[:, None],)
    store(out, 0, index, token, result, DIM, PIECES)
    place = logsumexp + index.to(tl.int64) * qkv.length + token
    tl.store(place, (largest + tl.log2(total)) * (1 / LOG2_E), mask=token < qkv.length)
