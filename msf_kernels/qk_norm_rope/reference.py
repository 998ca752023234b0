"""References of QK-norm and RoPE: what attention does to q and k before it compares them.

Mathematics runs in float32 (float64 for float64), with one rounding at each output. B, N, H, d are
batch, tokens, heads, head_dim; `options` are the fields of a `Preparation`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dtypes import compute_dtype, widen
from .preparation import Preparation


def qk_norm_rope(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Return q and k (B, N, H, d) of packed qkv (B, N, 3 * H * d), normalised and rotated."""
    given = Preparation(*options)
    q, k, _ = heads(biased(qkv, given.qkv_bias), given.num_heads)
    q = norm_rope(q, given.q_weight, given.q_norm_bias, given).to(qkv.dtype)
    k = norm_rope(k, given.k_weight, given.k_norm_bias, given).to(qkv.dtype)
    new = partial(torch.clone, memory_format=torch.contiguous_format)  # never a view of qkv
    return new(q.transpose(1, 2)), new(k.transpose(1, 2))


def qk_norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, qkv: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of qkv and of the parameters, empty for what is absent.

    The gradients that come in are (B, N, H, d). That of v, which passes through, is zero where it
    is absent: with it one pass packs what the backward of attention needs.
    """
    given = Preparation(*options)
    q, k, _ = heads(biased(qkv, given.qkv_bias), given.num_heads)
    grad_qkv = new_gradient(qkv)
    v_out = heads(grad_qkv, given.num_heads)[2]
    v_out.copy_(grad_v.transpose(1, 2)) if grad_v is not None else v_out.zero_()
    grads = grad_q.transpose(1, 2), grad_k.transpose(1, 2)
    return gradients(grad_qkv, *grads, q, k, qkv.dtype, given)


def new_gradient(qkv: Tensor) -> Tensor:
    """Make a contiguous tensor for qkv's gradient in its compute dtype."""
    return qkv.new_empty(qkv.shape, dtype=compute_dtype(qkv))


def gradients(
    grad_qkv: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    dtype: torch.dtype,
    given: Preparation,
) -> tuple[Tensor, ...]:
    """Return the gradients of qkv, in `dtype`, and of the parameters.

    `grad_qkv` has that of v and gets those of q and k. `grad_q` and `grad_k` are those of the
    prepared q and k, all (B, H, N, d); `q` and `k` have their bias, and are not prepared else.
    """
    q_out, k_out, _ = heads(grad_qkv, given.num_heads)
    grad_q_weight, grad_q_norm_bias = norm_rope_backward(
        q_out, grad_q, q, given.q_weight, given.q_norm_bias, given
    )
    grad_k_weight, grad_k_norm_bias = norm_rope_backward(
        k_out, grad_k, k, given.k_weight, given.k_norm_bias, given
    )
    grad_bias = grad_qkv.new_empty(0)
    if given.qkv_bias is not None:
        grad_bias = grad_qkv.sum((0, 1)).to(given.qkv_bias.dtype)
    of_norms = grad_q_weight, grad_k_weight, grad_q_norm_bias, grad_k_norm_bias
    return grad_qkv.to(dtype), grad_bias, *of_norms


def biased(qkv: Tensor, qkv_bias: Tensor | None) -> Tensor:
    """Return qkv and its bias, added up in the compute dtype."""
    return widen(qkv) if qkv_bias is None else widen(qkv) + qkv_bias


def heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k and v as views (B, H, N, d) of packed qkv (B, N, 3 * H * d)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def norm_rope(
    x: Tensor, weight: Tensor | None, norm_bias: Tensor | None, given: Preparation
) -> Tensor:
    """Return q or k (B, H, N, d), in the compute dtype, after norm and rotation.

    LayerNorm is RMS norm of what is left without the mean, and a bias after it.
    """
    x = x.contiguous()
    if weight is not None:
        x = _centred(x, given.norm)
        x = x * _rrms(x, given.eps) * weight
    if norm_bias is not None:
        x = x + norm_bias
    if given.rope is not None:
        x = _rotate(x, given.rope[0], given.rope[1])
    return x


def norm_rope_backward(
    out: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    given: Preparation,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of x to `out` and return those of the norm's weight and bias."""
    grad = widen(grad)
    if given.rope is not None:
        grad = _rotate(grad, given.rope[0], -given.rope[1])
    if weight is None:
        out.copy_(grad)
        return grad.new_empty(0), grad.new_empty(0)
    grad_bias = grad.new_empty(0)
    if norm_bias is not None:
        grad_bias = grad.sum((0, 1, 2)).to(norm_bias.dtype)
    x = _centred(x.contiguous(), given.norm)
    rrms = _rrms(x, given.eps)
    normalised = x * rrms
    product = grad * normalised
    grad_weight = product.sum((0, 1, 2)).to(weight.dtype)
    along = product.mul_(weight).mean(-1, keepdim=True)
    grad_x = (grad * weight).sub_(normalised.mul_(along)).mul_(rrms)
    out.copy_(_centred(grad_x, given.norm))
    return grad_weight, grad_bias


def _centred(x: Tensor, norm: str) -> Tensor:
    """Return x, for LayerNorm without its mean. The gradient of that is the same of a gradient."""
    return x - x.mean(-1, keepdim=True) if norm == "layer" else x


def _rrms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d / 2) of x (..., N, d) by angles given as (N, d / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
