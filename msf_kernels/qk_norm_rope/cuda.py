"""Calls of the CUDA kernels in csrc/kernels/qk_norm_rope.cu."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..cuda_support.launch import address, dtype, launch, parameter
from ..dtypes import compute_dtype
from ..grid import TARGET_BLOCKS
from ..layout import contiguous, empty_like
from .op import Gradients, new_gradients
from .preparation import Preparation


def unsupported_reason(qkv: Tensor, num_heads: int) -> str | None:
    head_dim = qkv.shape[-1] // (3 * num_heads)
    return None if head_dim <= 256 else f"head_dim is {head_dim}, at most 256 fits its warps"


def qk_norm_rope(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    given = Preparation(*options).map(contiguous)
    q, k, _ = heads(qkv, given.num_heads)
    q_out, k_out = empty_like(q), empty_like(k)
    launch(
        "qk_norm_rope",
        q,
        dtype(q),
        tuple(q.shape),
        view(q),
        view(k),
        preparation(given),
        address(q_out),
        address(k_out),
    )
    return q_out, k_out


def qk_norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, qkv: Tensor, *options: Any
) -> Gradients:
    given = Preparation(*options).map(contiguous)
    q, k, _ = heads(qkv, given.num_heads)
    grad_q, grad_k = rows(grad_q), rows(grad_k)
    grad_v = None if grad_v is None else rows(grad_v)
    gradients = new_gradients(qkv, *given.parameters)
    partials = partial(q.new_empty, dtype=compute_dtype(q))
    bias_partials = norm_partials = None
    blocks = TARGET_BLOCKS + given.num_heads  # and a block a head, to step by whole tokens
    if given.qkv_bias is not None:
        bias_partials = partials((3, blocks * min(given.num_heads, 256), q.shape[-1]))
    if any(x is not None for x in given.parameters[1:]):
        norm_partials = partials((4, blocks, q.shape[-1]))
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
        preparation(given),
        address(gradients[0]),
        address(norm_partials),
        address(bias_partials),
        TARGET_BLOCKS,
        tuple(map(parameter, gradients[1:])),
    )
    return gradients


def heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k and v (B, N, H, d), views of qkv unless its last dimension is strided."""
    return rows(qkv).unflatten(-1, (3, num_heads, -1)).unbind(2)


def rows(x: Tensor) -> Tensor:
    """Return x with contiguous channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def view(x: Tensor | None) -> tuple[int, ...] | None:
    """Return x (B, N, H, d) as an msf::HeadsView."""
    return None if x is None else (address(x), *x.stride()[:3])


def preparation(given: Preparation) -> tuple[Any, ...]:
    """Return it, whose tensors are contiguous, as an msf::Preparation."""
    return *map(parameter, given.parameters), address(given.rope), given.eps, given.norm == "layer"
