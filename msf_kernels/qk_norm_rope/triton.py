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
from .preparation import PARAMETERS, Preparation
from .triton_kernels import backward_kernel, forward_kernel
from .triton_tiles import Heads


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


def qk_norm_rope(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    given = Preparation(*options)
    q, k, _ = unpack(qkv, given.num_heads)
    q_out, k_out = empty_like(q), empty_like(k)
    tile = Tile.of(q)
    launch(
        forward_kernel,
        q.device,
        2 * tile.count,
        **views(q=q, k=k, q_out=q_out, k_out=k_out),
        **pointers(given, "q_norm_bias", "k_norm_bias"),
        **tile.arguments(q),
        eps=given.eps,
        LAYER=given.norm == "layer",
        warps=tile.warps,
    )
    return q_out, k_out


def qk_norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, qkv: Tensor, *options: Any
) -> Gradients:
    given = Preparation(*options)
    q, k, _ = unpack(qkv, given.num_heads)
    gradients = new_gradients(qkv, *given.parameters)
    grad_qkv, grad_bias, *grads_of_norms = gradients
    tile = Tile.of(q, 4)  # with 8 in 16 bits, Triton 3.6 took 124 registers a thread
    # Programs step by whole tokens, so that a row of their tiles has one head.
    token = given.num_heads // math.gcd(given.num_heads, tile.rows)
    programs = triton.cdiv(min(TARGET_BLOCKS, tile.count), token) * token
    partials = partial(q.new_empty, dtype=compute_dtype(q))
    of_norms: dict[str, Any] = {
        f"{name}_partials_ptr": None if x is None else partials((programs, q.shape[3]))
        for name, x in zip(PARAMETERS[1:], given.parameters[1:])
    }
    biases = given.qkv_bias, given.q_norm_bias, given.k_norm_bias
    has_biases = any(x is not None for x in biases)
    rows = 3, programs * tile.rows, q.shape[3]
    bias_partials = None if given.qkv_bias is None else partials(rows)
    q_out, k_out, v_out = unpack(grad_qkv, given.num_heads)
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
        **pointers(given),
        bias_partials_ptrs=parts(bias_partials),
        **of_norms,
        programs=programs,
        **tile.arguments(q),
        eps=given.eps,
        LAYER=given.norm == "layer",
        warps=tile.warps,
        # Six blocks of 128 threads fit an SM, with the sums of biases five. Left to itself, ptxas
        # 13.4 spills to fit a seventh.
        maxnreg=96 if has_biases else 80,
    )
    pairs = zip(of_norms.values(), grads_of_norms, strict=True)
    sum_partials([(sums, grad[None]) for sums, grad in pairs if sums is not None])
    if bias_partials is not None:
        width = given.num_heads * q.shape[3]
        sum_partials([(bias_partials.view(-1, width), grad_bias.view(3, width))])
    return gradients


def pointers(given: Preparation, *others: str) -> dict[str, Any]:
    """Return biases, norm weights, rope and the others of a Preparation as arguments of kernels."""
    names = "q_weight", "k_weight", "rope", *others
    named = {f"{name}_ptr": contiguous(getattr(given, name)) for name in names}
    return {"bias_ptrs": parts(given.qkv_bias), **named}


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
