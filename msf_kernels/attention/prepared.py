"""q, k and v of packed qkv for an attention that takes them with bias, norm and rotation done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..layout import aligned
from ..qk_norm_rope.preparation import Preparation


def heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k and v (B, N, H, d) as views of qkv, or of a copy where it is not aligned."""
    return aligned(qkv).unflatten(-1, (3, num_heads, -1)).unbind(2)


def prepared(
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor]], qkv: Tensor, given: Preparation
) -> tuple[Tensor, ...]:
    """Return q, k and v (B, N, H, d); `qk_norm_rope` is the operator, or a backend of it."""
    q, k, v = heads(qkv, given.num_heads)
    if not given.is_empty:
        q, k = qk_norm_rope(qkv, *given)
    if given.qkv_bias is not None:
        bias = given.qkv_bias.unflatten(-1, (3, given.num_heads, -1))[2]
        v = torch.add(v, bias, out=v.new_empty(v.shape))  # one kernel, rounding once
    return q, k, v
