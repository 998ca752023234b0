"""References of QK-norm and RoPE: what attention does to q and k before it compares them.

Mathematics runs in float32 (float64 for float64), with one rounding at each output. B, N, H, d are
batch, tokens, heads, head_dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..dtypes import compute_dtype, widen


def qk_norm_rope(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return q and k (B, N, H, d) of packed qkv (B, N, 3 * H * d), normalised and rotated."""
    q, k, _ = heads(biased(qkv, qkv_bias), num_heads)
    q = norm_rope(q, q_weight, rope, eps).to(qkv.dtype)
    k = norm_rope(k, k_weight, rope, eps).to(qkv.dtype)
    new = partial(torch.clone, memory_format=torch.contiguous_format)  # never a view of qkv
    return new(q.transpose(1, 2)), new(k.transpose(1, 2))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of qkv, of its bias and of the norm weights, empty for what is absent.

    The gradients that come in are (B, N, H, d). That of v, which passes through, is zero where it
    is absent: with it one pass packs what the backward of attention needs.
    """
    q, k, _ = heads(biased(qkv, qkv_bias), num_heads)
    grad_qkv = new_gradient(qkv)
    q_out, k_out, v_out = heads(grad_qkv, num_heads)
    v_out.copy_(grad_v.transpose(1, 2)) if grad_v is not None else v_out.zero_()
    grad_q_weight = norm_rope_backward(q_out, grad_q.transpose(1, 2), q, q_weight, rope, eps)
    grad_k_weight = norm_rope_backward(k_out, grad_k.transpose(1, 2), k, k_weight, rope, eps)
    grad_bias = bias_gradient(grad_qkv, qkv_bias)
    return grad_qkv.to(qkv.dtype), grad_bias, grad_q_weight, grad_k_weight


def new_gradient(qkv: Tensor) -> Tensor:
    """Make a contiguous tensor for qkv's gradient in its compute dtype."""
    return qkv.new_empty(qkv.shape, dtype=compute_dtype(qkv))


def bias_gradient(grad_qkv: Tensor, qkv_bias: Tensor | None) -> Tensor:
    """Return the gradient (3 * H * d,) of qkv's bias, empty where there is none."""
    if qkv_bias is None:
        return grad_qkv.new_empty(0)
    return grad_qkv.sum((0, 1)).to(qkv_bias.dtype)


def biased(qkv: Tensor, qkv_bias: Tensor | None) -> Tensor:
    """Return qkv and its bias, added up in the compute dtype."""
    return widen(qkv) if qkv_bias is None else widen(qkv) + qkv_bias


def heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k and v as views (B, H, N, d) of packed qkv (B, N, 3 * H * d)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def norm_rope(x: Tensor, weight: Tensor | None, rope: Tensor | None, eps: float) -> Tensor:
    """Return q or k (B, H, N, d), in the compute dtype, after RMS norm and rotation."""
    x = x.contiguous()
    if weight is not None:
        x = x * _rrms(x, eps) * weight
    if rope is not None:
        x = _rotate(x, rope[0], rope[1])
    return x


def norm_rope_backward(
    out: Tensor, grad: Tensor, x: Tensor, weight: Tensor | None, rope: Tensor | None, eps: float
) -> Tensor:
    """Write the gradient of x to `out` and return that of the weight."""
    grad = widen(grad)
    if rope is not None:
        grad = _rotate(grad, rope[0], -rope[1])
    if weight is None:
        out.copy_(grad)
        return grad.new_empty(0)
    x = x.contiguous()
    rrms = _rrms(x, eps)
    normalised = x * rrms
    product = grad * normalised
    grad_weight = product.sum((0, 1, 2)).to(weight.dtype)
    along = product.mul_(weight).mean(-1, keepdim=True)
    out.copy_((grad * weight).sub_(normalised.mul_(along)).mul_(rrms))
    return grad_weight


def _rrms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d / 2) of x (..., N, d) by angles given as (N, d / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
