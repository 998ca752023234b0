"""Triton runs qk_norm_rope and its gradient, each in one pass over memory.

A tile is some heads by half a head: the two halves of a head are two tiles, so that the pairs
(i, i + d / 2) that RoPE rotates lie in one place of both. Heads are counted (B, N, H).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..layout import contiguous
from ..triton_support.arithmetic import divide, narrow, widen
from ..triton_support.launch import launch, power_of_2, tiles
from .op import weight_gradient

PARTIALS = 528  # programs that each sum their share of a weight's gradient: four an SM of an H200


class Heads(NamedTuple):
    """Heads (B, N, H, d) are their memory and strides, from head to head in UNITs of elements.

    Triton knows of a number whether it is a multiple of 16, which 72 is not; of a product with UNIT
    it knows UNIT, and reads 8 bytes at once.
    """

    data: Any
    batch: int
    token: int
    head: int
    element: int


@dataclass(frozen=True)
class Tile:
    """A tile is a program's heads by half a head, rounded up to a power of 2; count such tiles."""

    rows: int
    width: int
    warps: int
    count: int

    @classmethod
    def of(cls, x: Tensor, max_elements: int = 8) -> Tile:
        """A thread owns 16 bytes of either half of a head, at most ``max_elements`` of them, and a
        block has up to 128 threads."""
        batch, tokens, heads, head_dim = x.shape
        total = batch * tokens * heads
        width = power_of_2((head_dim + 1) // 2)
        a_thread = min(max_elements, 16 // x.element_size())
        rows = min(power_of_2(total), max(1, 128 * a_thread // width))
        warps = min(4, max(1, rows * width // a_thread // 32))
        return cls(rows, width, warps, tiles(total, 1, rows, 1))


@triton.jit
def own_heads(index, grid, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Of tile ``index`` the heads (batch, token, head), and the elements of their first half."""
    row = index * ROWS + tl.arange(0, ROWS)[:, None]
    _, tokens, heads = grid
    return row // heads // tokens, row // heads % tokens, row % heads, tl.arange(0, WIDTH)[None, :]


@triton.jit
def places(x, tile, grid, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where the two halves of the heads lie, and which of their elements exist."""
    batch, token, head, i = tile
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    start = batch.to(tl.int64) * x.batch + token.to(tl.int64) * x.token + head.to(tl.int64) * x.head
    first = x.data + start * UNIT + i.to(tl.int64) * x.element
    exists = batch < grid[0]
    second = first + tl.full((), half, tl.int64) * x.element
    return first, second, exists & (i < half), exists & (half + i < HEAD_DIM)


@triton.jit
def load_heads(x, tile, grid, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    first, second, exists, paired = places(x, tile, grid, UNIT, HEAD_DIM)
    first, second = tl.load(first, mask=exists, other=0), tl.load(second, mask=paired, other=0)
    return widen(first), widen(second)


@triton.jit
def store_heads(x, tile, grid, first, second, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    to_first, to_second, exists, paired = places(x, tile, grid, UNIT, HEAD_DIM)
    tl.store(to_first, narrow(first, x.data.dtype.element_ty), mask=exists)
    tl.store(to_second, narrow(second, x.data.dtype.element_ty), mask=paired)


@triton.jit
def load_weight(weight, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    i, half = tl.arange(0, WIDTH)[None, :], (HEAD_DIM + 1) // 2
    first = tl.load(weight + i, mask=i < half, other=0)
    return widen(first), widen(tl.load(weight + half + i, mask=half + i < HEAD_DIM, other=0))


@triton.jit
def rotate(first, second, rope, tile, grid, SIGN: tl.constexpr, HEAD_DIM: tl.constexpr):
    """By the angles of the heads' tokens, forwards or back."""
    batch, token, _, i = tile
    half: tl.constexpr = HEAD_DIM // 2
    cosines, exists = rope + token * half + i, (batch < grid[0]) & (i < half)
    cos = tl.load(cosines, mask=exists, other=1)
    sin = SIGN * tl.load(cosines + grid[1] * half, mask=exists, other=0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def mean(x, HEAD_DIM: tl.constexpr):
    """Of every row, of which the two halves of a head were added."""
    return divide(tl.sum(x, 1)[:, None], tl.full((), HEAD_DIM, x.dtype))


@triton.jit
def reciprocal_rms(first, second, eps, HEAD_DIM: tl.constexpr):
    squares = mean(first * first + second * second, HEAD_DIM)
    return tl.rsqrt(squares + tl.full((), eps, squares.dtype))


@triton.jit
def prepare(
    x, out, weight, rope, index, grid, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    tile = own_heads(index, grid, ROWS, WIDTH)
    first, second = load_heads(x, tile, grid, UNIT, HEAD_DIM)
    if weight is not None:
        rrms = reciprocal_rms(first, second, eps, HEAD_DIM)
        first_weight, second_weight = load_weight(weight, WIDTH, HEAD_DIM)
        first, second = first * rrms * first_weight, second * rrms * second_weight
    if rope is not None:
        first, second = rotate(first, second, rope, tile, grid, 1, HEAD_DIM)
    store_heads(out, tile, grid, first, second, UNIT, HEAD_DIM)


@triton.jit
def forward_kernel(
    q, k, q_out, k_out, q_weight, k_weight, rope, grid, eps: tl.float64, count,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The first ``count`` programs have q, the others k."""
    index = tl.program_id(0)
    if index < count:
        prepare(q, q_out, q_weight, rope, index, grid, eps, ROWS, WIDTH, UNIT, HEAD_DIM)
    else:
        prepare(k, k_out, k_weight, rope, index - count, grid, eps, ROWS, WIDTH, UNIT, HEAD_DIM)


@triton.jit
def prepare_backward(
    grad, x, out, weight, partial, rope, index, programs, grid, eps, count,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Of every ``programs``-th tile from ``index`` on; the weight's gradient summed in that order.

    Also copies, where there is nothing else to do, or writes zeros where there is no ``grad``.
    """
    dtype = tl.float64 if out.data.dtype.element_ty == tl.float64 else tl.float32
    first_sum, second_sum = tl.zeros((1, WIDTH), dtype), tl.zeros((1, WIDTH), dtype)
    if weight is not None:
        first_weight, second_weight = load_weight(weight, WIDTH, HEAD_DIM)
    at = index
    # Not a range, because the interpreter of Triton 3.6 cannot count one with NumPy 2.4.
    while at < count:
        tile = own_heads(at, grid, ROWS, WIDTH)
        if grad is not None:
            first, second = load_heads(grad, tile, grid, UNIT, HEAD_DIM)
        else:
            first, second = tl.zeros((ROWS, WIDTH), dtype), tl.zeros((ROWS, WIDTH), dtype)
        if rope is not None:
            first, second = rotate(first, second, rope, tile, grid, -1, HEAD_DIM)
        if weight is not None:
            x_first, x_second = load_heads(x, tile, grid, UNIT, HEAD_DIM)
            # 0 where there is no head, of which an eps of 0 would leave infinity.
            rrms = reciprocal_rms(x_first, x_second, eps, HEAD_DIM)
            rrms = tl.where(tile[0] < grid[0], rrms, 0)
            x_first, x_second = x_first * rrms, x_second * rrms
            first_sum += tl.sum(first * x_first, 0)[None, :]
            second_sum += tl.sum(second * x_second, 0)[None, :]
            first, second = first * first_weight, second * second_weight
            along = mean(first * x_first + second * x_second, HEAD_DIM)
            first, second = (first - x_first * along) * rrms, (second - x_second * along) * rrms
        store_heads(out, tile, grid, first, second, UNIT, HEAD_DIM)
        at += programs
    if weight is not None:
        i, half = tl.arange(0, WIDTH)[None, :], (HEAD_DIM + 1) // 2
        partial += index * HEAD_DIM + i
        tl.store(partial, first_sum, mask=i < half)
        tl.store(partial + half, second_sum, mask=half + i < HEAD_DIM)


@triton.jit
def backward_kernel(
    grad_q, grad_k, grad_v, q, k, q_out, k_out, v_out, q_weight, k_weight, q_partial, k_partial,
    rope, programs, grid, eps: tl.float64, count,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """``programs`` programs have q, as many k and as many v."""
    index = tl.program_id(0)
    if index < programs:
        prepare_backward(
            grad_q, q, q_out, q_weight, q_partial, rope, index, programs, grid, eps, count,
            ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip
    elif index < 2 * programs:
        prepare_backward(
            grad_k, k, k_out, k_weight, k_partial, rope, index - programs, programs, grid, eps,
            count, ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip
    else:
        prepare_backward(
            grad_v, None, v_out, None, None, None, index - 2 * programs, programs, grid, eps,
            count, ROWS, WIDTH, UNIT, HEAD_DIM,
        )  # fmt: skip


@triton.jit
def sum_kernel(partial, grad_weight, programs, head_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of the partial sums (programs, d), always in one order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), partial.dtype.element_ty)
    start = 0
    while start < programs:
        row = start + tl.arange(0, ROWS)[:, None]
        exists = (row < programs) & (column < head_dim)
        total += tl.load(partial + row * head_dim + column, mask=exists, other=0)
        start += ROWS
    value = narrow(tl.sum(total, 0)[None, :], grad_weight.dtype.element_ty)
    tl.store(grad_weight + column, value, mask=column < head_dim)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q, k, _ = unpack(qkv, num_heads)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    tile = Tile.of(q)
    unit, *heads = views(q, k, q_out, k_out)
    weights = contiguous(q_weight), contiguous(k_weight), contiguous(rope)
    numbers = tuple(q.shape[:3]), eps, tile.count, tile.rows, tile.width, unit, q.shape[3]
    launch(forward_kernel, q.device, 2 * tile.count, *heads, *weights, *numbers, warps=tile.warps)
    return q_out, k_out


def qk_norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, _ = unpack(qkv, num_heads)
    grad_qkv = qkv.new_empty(qkv.shape)
    tile = Tile.of(q, 4)  # with 8 in 16 bits, Triton 3.6 took 124 registers a thread
    programs = min(PARTIALS, tile.count)
    partials = [
        None if weight is None else q.new_empty((programs, q.shape[3]), dtype=compute_dtype(q))
        for weight in (q_weight, k_weight)
    ]
    unit, *heads = views(grad_q, grad_k, grad_v, q, k, *unpack(grad_qkv, num_heads))
    weights = contiguous(q_weight), contiguous(k_weight), *partials, contiguous(rope)
    numbers = programs, tuple(q.shape[:3]), eps, tile.count, tile.rows, tile.width, unit, q.shape[3]
    arguments = *heads, *weights, *numbers
    launch(backward_kernel, q.device, 3 * programs, *arguments, warps=tile.warps)
    grad_weights = weight_gradient(q_weight, qkv), weight_gradient(k_weight, qkv)
    for partial, grad_weight in zip(partials, grad_weights):
        if partial is not None:
            columns = triton.cdiv(q.shape[3], 32)
            sizes = programs, q.shape[3], 32, 32
            launch(sum_kernel, q.device, columns, partial, grad_weight, *sizes, warps=4)
    return grad_qkv, *grad_weights


def unpack(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k and v as views (B, N, H, d)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)


def views(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return UNIT, and the tensors (B, N, H, d) as Heads."""
    strides = [stride for x in tensors if x is not None for stride in x.stride()[:3]]
    unit = math.gcd(8, *strides)

    def view(x: Tensor) -> Heads:
        batch, token, head, element = x.stride()
        return Heads(x, batch // unit, token // unit, head // unit, element)

    return unit, *(None if x is None else view(x) for x in tensors)


def _audited(head_dim: int, **options: bool) -> dict[str, Any]:
    norm, rope = options["norm"], options["rope"]

    def arguments(new: Any) -> tuple[Any, ...]:
        weight = new(head_dim) if norm else None
        table = new(2, 256, head_dim // 2).float() if rope else None
        return new(2, 256, 3 * 16 * head_dim), weight, weight, table, 16, 1e-6

    def backward(new: Any) -> Any:
        grads = (new(2, 256, 16 * head_dim).unflatten(2, (16, head_dim)) for _ in range(3))
        return qk_norm_rope_backward(*grads, *arguments(new))

    name = " ".join([f"d = {head_dim}", *(name for name, given in options.items() if given)])
    return {name: lambda new: qk_norm_rope(*arguments(new)), f"{name} backward": backward}


# Calls that launch every kernel; new(*shape) makes a tensor. See audit/triton.py.
AUDITED = {
    **_audited(64, norm=True, rope=True),
    **_audited(72, norm=True, rope=True),
    **_audited(72, norm=True, rope=False),
    **_audited(72, norm=False, rope=True),
}
