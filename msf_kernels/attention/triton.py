"""Triton runs attention straight from packed qkv, with norm and rotation inside."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from ..dtypes import compute_dtype
from ..layout import aligned, contiguous
from ..triton_support import interpreted
from ..triton_support.launch import WGMMA_UNSUPPORTED_REASON, launch
from .triton_backward import backward_kernel, head_backward_kernel
from .triton_forward import forward_kernel
from .triton_heads import Tokens
from .triton_tile import Tile

MAX_HEAD_DIM = 128  # The tiles of a larger one would not fit the shared memory of every GPU.


def unsupported_reason(qkv: Tensor, num_heads: int) -> str | None:
    """Return why forward and backward cannot take the arguments, None where they can."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    if interpreted():
        return None
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is at most {MAX_HEAD_DIM}, got {head_dim}"
    if WGMMA_UNSUPPORTED_REASON and has_wgmma(qkv.device):
        return WGMMA_UNSUPPORTED_REASON
    return None


def attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, count, width = qkv.shape
    tile = _tile(qkv, num_heads, backward=False)
    out = qkv.new_empty(batch, count, width // 3)
    logsumexp = qkv.new_empty((batch, num_heads, count), dtype=compute_dtype(qkv))
    launch(
        forward_kernel,
        qkv.device,
        batch * num_heads * triton.cdiv(count, tile.block_m),
        qkv=_prepared(qkv, num_heads, q_weight, k_weight, rope, eps),
        out=_tokens(out, num_heads),
        lse_ptr=logsumexp,
        **tile.arguments(),
        **_options(tile),
    )
    return out, logsumexp


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, width = qkv.shape
    tile = _tile(qkv, num_heads, backward=True)
    grad_qkv = qkv.new_empty(qkv.shape)
    # Each tile of queries and each of keys writes its sum for the gradient of its norm weight.
    sums = batch * num_heads, 2, triton.cdiv(count, tile.block_m), width // (3 * num_heads)
    partials = qkv.new_empty(sums, dtype=compute_dtype(qkv))
    launch(
        head_backward_kernel if tile.alone else backward_kernel,
        qkv.device,
        batch * num_heads if tile.alone else partials[..., 0].numel(),
        grad_out=_tokens(aligned(grad), num_heads),
        qkv=_prepared(qkv, num_heads, q_weight, k_weight, rope, eps),
        out=_tokens(aligned(out), num_heads),
        lse_ptr=logsumexp.contiguous(),
        grad_qkv=_tokens(grad_qkv, num_heads),
        partials_ptr=partials,
        **tile.arguments(),
        **_options(tile),
    )
    grad_q_weight = _sum_over_tiles(partials[:, 0], q_weight)
    return grad_qkv, grad_q_weight, _sum_over_tiles(partials[:, 1], k_weight)


def _sum_over_tiles(partials: Tensor, weight: Tensor | None) -> Tensor:
    """Return the gradient (d,) of a norm weight from partials (B * H, tiles, d); empty for None."""
    if weight is None:
        return partials.new_empty(0)
    return partials.sum((0, 1)).to(weight.dtype)


def _prepared(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    eps: float,
) -> Tokens:
    """Return qkv as Tokens with what its q and k pass on their way into a tile."""
    return _tokens(aligned(qkv), num_heads)._replace(
        q_weight_ptr=contiguous(q_weight),
        k_weight_ptr=contiguous(k_weight),
        rope_ptr=contiguous(rope),
        eps=tl.constexpr(eps),
    )


def _tokens(x: Tensor, num_heads: int) -> Tokens:
    """Return x (B, N, channels) as Tokens."""
    batch, token = x.stride(0) if len(x) > 1 else 0, x.stride(1)
    unit = math.gcd(batch, token, 8)
    return Tokens(x, batch // unit, token // unit, tl.constexpr(unit), x.shape[1], num_heads)


def _tile(qkv: Tensor, num_heads: int, backward: bool) -> Tile:
    dim = qkv.shape[2] // (3 * num_heads)
    return Tile.of(qkv.shape[1], dim, qkv.element_size(), backward, has_wgmma(qkv.device))


def has_wgmma(device: torch.device) -> bool:
    """Tell whether the GPU is of sm_90 to sm_11x.

    Tensors without memory are taken for those of the GPU that Triton compiles for. The interpreter,
    which is slow at each step, gets the large tiles of such a GPU.
    """
    if device.type == "cuda":
        return 9 <= torch.cuda.get_device_capability(device)[0] < 12
    return interpreted() or 90 <= driver.active.get_current_target().arch < 120


def _options(tile: Tile) -> dict[str, Any]:
    """Return the options of a launch.

    Attention agrees with the reference to the rounding of its dtype, so multiply-adds are fused.
    """
    return {"warps": tile.warps, "num_stages": tile.stages, "fused": True}
