"""Calls of the CUDA kernels in csrc/kernels/qk_norm_rope.cu."""

from __future__ import annotations

from torch import Tensor

from ..cuda_support.launch import address, dtype, launch
from ..dtypes import compute_dtype
from ..grid import TARGET_BLOCKS
from ..layout import contiguous
from .op import new_weight_gradient


def unsupported_reason(qkv: Tensor, num_heads: int) -> str | None:
    head_dim = qkv.shape[-1] // (3 * num_heads)
    return None if head_dim <= 256 else f"head_dim is {head_dim}, at most 256 fits its warps"


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q, k, _ = heads(qkv, num_heads)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    q_weight, k_weight, rope = contiguous(q_weight), contiguous(k_weight), contiguous(rope)
    launch(
        "qk_norm_rope",
        q,
        dtype(q),
        tuple(q.shape),
        view(q),
        view(k),
        weight(q_weight),
        weight(k_weight),
        address(rope),
        eps,
        address(q_out),
        address(k_out),
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
    q, k, _ = heads(qkv, num_heads)
    grad_q, grad_k = rows(grad_q), rows(grad_k)
    grad_v = None if grad_v is None else rows(grad_v)
    q_weight, k_weight, rope = contiguous(q_weight), contiguous(k_weight), contiguous(rope)
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_q_weight = new_weight_gradient(q_weight, qkv)
    grad_k_weight = new_weight_gradient(k_weight, qkv)
    partials = None
    if q_weight is not None or k_weight is not None:
        partials = q.new_empty((2, TARGET_BLOCKS, q.shape[-1]), dtype=compute_dtype(q))
    launch(
        "qk_norm_rope_backward",
        q,
        dtype(q),
        tuple(q.shape),
        view(grad_q),
        view(grad_k),
        view(grad_v),
        view(q),
        view(k),
        weight(q_weight),
        weight(k_weight),
        address(rope),
        eps,
        address(grad_qkv),
        address(partials),
        TARGET_BLOCKS,
        weight(grad_q_weight if q_weight is not None else None),
        weight(grad_k_weight if k_weight is not None else None),
    )
    return grad_qkv, grad_q_weight, grad_k_weight


def heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k and v (B, N, H, d), views of qkv unless its last dimension is strided."""
    return rows(qkv).unflatten(-1, (3, num_heads, -1)).unbind(2)


def rows(x: Tensor) -> Tensor:
    """Return x with contiguous channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def view(x: Tensor | None) -> tuple[int, ...] | None:
    """Return x (B, N, H, d) as an msf::HeadsView."""
    return None if x is None else (x.data_ptr(), *x.stride()[:3])


def weight(x: Tensor | None) -> tuple[int, int] | None:
    """Return a norm weight (d,), or its gradient, as an msf::NormWeight."""
    return None if x is None else (x.data_ptr(), dtype(x))
