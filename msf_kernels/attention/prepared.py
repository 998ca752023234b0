"""q, k and v of packed qkv for an attention that takes them with bias, norm and rotation done."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..dtypes import widen
from ..layout import aligned
from ..qk_norm_rope.op import is_prepared


def heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k and v (B, N, H, d) as views of qkv, or of a copy where it is not aligned."""
    return aligned(qkv).unflatten(-1, (3, num_heads, -1)).unbind(2)


def prepared(
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor]],
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Return q, k and v (B, N, H, d); `qk_norm_rope` is the operator, or a backend of it."""
    q, k, v = heads(qkv, num_heads)
    if is_prepared(qkv_bias, q_weight, k_weight, rope):
        q, k = qk_norm_rope(qkv, qkv_bias, q_weight, k_weight, rope, num_heads, eps)
    if qkv_bias is not None:
        v = (widen(v) + qkv_bias.unflatten(-1, (3, num_heads, -1))[2]).to(qkv.dtype)
    return q, k, v
