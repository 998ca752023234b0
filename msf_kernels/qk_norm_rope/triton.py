"""Triton runs qk_norm_rope and its gradient, each in one pass over memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..dtypes import compute_dtype
from ..grid import TARGET_BLOCKS
from ..layout import contiguous
from ..triton_support.launch import launch, power_of_2, tiles
from ..triton_support.rows import sum_partials
from .op import new_weight_gradient
from .triton_kernels import Heads, backward_kernel, forward_kernel


@dataclass(frozen=True)
class Tile:
    """A tile is a program's heads by half a head, rounded up to a power of 2."""

    rows: int
    width: int
    warps: int
    count: int  # of tiles that hold all heads

    @classmethod
    def of(cls, x: Tensor, max_elements: int = 8) -> Tile:
        """Make tiles of the heads x (B, N, H, d).

        A thread owns 16 bytes of either half of a head, at most ``max_elements`` elements of it,
        and a block has up to 128 threads.
        """
        batch, tokens, heads, head_dim = x.shape
        total = batch * tokens * heads
        width = power_of_2((head_dim + 1) // 2)
        a_thread = min(max_elements, 16 // x.element_size())
        rows = min(power_of_2(total), max(1, 128 * a_thread // width))
        warps = min(4, max(1, rows * width // a_thread // 32))
        return cls(rows, width, warps, tiles(total, 1, rows, 1))

    def arguments(self, x: Tensor) -> dict[str, Any]:
        """Return the arguments of kernels that go through the heads x."""
        return {
            "extent": tuple(x.shape[:3]),
            "count": self.count,
            "ROWS": self.rows,
            "WIDTH": self.width,
            "HEAD_DIM": x.shape[3],
        }


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
    launch(
        forward_kernel,
        q.device,
        2 * tile.count,
        **views(q=q, k=k, q_out=q_out, k_out=k_out),
        q_weight_ptr=contiguous(q_weight),
        k_weight_ptr=contiguous(k_weight),
        rope_ptr=contiguous(rope),
        **tile.arguments(q),
        eps=eps,
        warps=tile.warps,
    )
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
    programs = min(TARGET_BLOCKS, tile.count)
    q_partials, k_partials = (
        None if weight is None else q.new_empty((programs, q.shape[3]), dtype=compute_dtype(q))
        for weight in (q_weight, k_weight)
    )
    q_out, k_out, v_out = unpack(grad_qkv, num_heads)
    launch(
        backward_kernel,
        q.device,
        3 * programs,
        **views(
            grad_q=grad_q,
            grad_k=grad_k,
            grad_v=grad_v,
            q=q,
            k=k,
            q_out=q_out,
            k_out=k_out,
            v_out=v_out,
        ),
        q_weight_ptr=contiguous(q_weight),
        k_weight_ptr=contiguous(k_weight),
        q_partials_ptr=q_partials,
        k_partials_ptr=k_partials,
        rope_ptr=contiguous(rope),
        programs=programs,
        **tile.arguments(q),
        eps=eps,
        warps=tile.warps,
        # Six blocks of 128 threads fit an SM. Left to itself, ptxas 13.4 spills to fit a seventh.
        maxnreg=80,
    )
    grad_q_weight, grad_k_weight = (
        new_weight_gradient(q_weight, qkv),
        new_weight_gradient(k_weight, qkv),
    )
    pairs = (q_partials, grad_q_weight), (k_partials, grad_k_weight)
    sum_partials([(partials, grad[None]) for partials, grad in pairs if partials is not None])
    return grad_qkv, grad_q_weight, grad_k_weight


def unpack(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k and v as views (B, N, H, d)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)


def views(**tensors: Tensor | None) -> dict[str, Any]:
    """Return the tensors (B, N, H, d) as Heads, and UNIT."""
    strides = [stride for x in tensors.values() if x is not None for stride in x.stride()[:3]]
    unit = math.gcd(8, *strides)

    def view(x: Tensor) -> Heads:
        batch, token, head, element = x.stride()
        return Heads(x, batch // unit, token // unit, head // unit, element)

    heads = {name: None if x is None else view(x) for name, x in tensors.items()}
    return {**heads, "UNIT": unit}
