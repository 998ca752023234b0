"""Triton runs qk_norm_rope and its gradient, each in one pass over memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import triton
from torch import Tensor

from ..dtypes import compute_dtype
from ..grid import TARGET_BLOCKS
from ..layout import contiguous, empty_like
from ..triton_support.launch import launch, power_of_2, tiles
from ..triton_support.rows import sum_partials
from .op import Gradients, new_gradients
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
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q, k, _ = unpack(qkv, num_heads)
    q_out, k_out = empty_like(q), empty_like(k)
    tile = Tile.of(q)
    launch(
        forward_kernel,
        q.device,
        2 * tile.count,
        **views(q=q, k=k, q_out=q_out, k_out=k_out),
        bias_ptrs=parts(qkv_bias),
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
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> Gradients:
    q, k, _ = unpack(qkv, num_heads)
    gradients = new_gradients(qkv, qkv_bias, q_weight, k_weight)
    grad_qkv, grad_bias, *grad_weights = gradients
    tile = Tile.of(q, 4)  # with 8 in 16 bits, Triton 3.6 took 124 registers a thread
    # Programs step by whole tokens, so that a row of their tiles has one head.
    token = num_heads // math.gcd(num_heads, tile.rows)
    programs = triton.cdiv(min(TARGET_BLOCKS, tile.count), token) * token
    partials = partial(q.new_empty, dtype=compute_dtype(q))
    weight_partials = [
        None if weight is None else partials((programs, q.shape[3]))
        for weight in (q_weight, k_weight)
    ]
    rows = 3, programs * tile.rows, q.shape[3]
    bias_partials = None if qkv_bias is None else partials(rows)
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
        bias_ptrs=parts(qkv_bias),
        q_weight_ptr=contiguous(q_weight),
        k_weight_ptr=contiguous(k_weight),
        bias_partials_ptrs=parts(bias_partials),
        q_partials_ptr=weight_partials[0],
        k_partials_ptr=weight_partials[1],
        rope_ptr=contiguous(rope),
        programs=programs,
        **tile.arguments(q),
        eps=eps,
        warps=tile.warps,
        # Six blocks of 128 threads fit an SM, with the sums of a bias five. Left to itself, ptxas
        # 13.4 spills to fit a seventh.
        maxnreg=80 if qkv_bias is None else 96,
    )
    pairs = zip(weight_partials, grad_weights, strict=True)
    sum_partials([(sums, grad[None]) for sums, grad in pairs if sums is not None])
    if bias_partials is not None:
        width = num_heads * q.shape[3]
        sum_partials([(bias_partials.view(-1, width), grad_bias.view(3, width))])
    return gradients


def parts(x: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the parts of q, k and v, the thirds of x; three times None for None."""
    return (None,) * 3 if x is None else x.contiguous().flatten().chunk(3)


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
