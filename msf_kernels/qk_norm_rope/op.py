"""qk_norm_rope as an operator."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..layout import new_gradient
from ..library import define
from . import reference

# The gradients of qkv, its bias, q_weight and k_weight.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def qk_norm_rope(
    qkv: Tensor,
    *,
    num_heads: int,
    qkv_bias: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return q and k as `attention` prepares them, for another library's attention.

    q and k of packed qkv get their part of `qkv_bias`, then pass a per-head RMS norm (QK-norm:
    Henry et al., 2020; Dehghani et al., 2023), then a rotation by `rope` (RoPE: Su et al., 2021);
    each is optional. v is `qkv.unflatten(-1, (3, num_heads, -1))[:, :, 2]`, without a copy and
    before its part of the bias.

    Args:
        qkv: (B, N, 3 * H * d) float64, float32, bfloat16 or float16, laid out [q | k | v].
        num_heads: H.
        qkv_bias: (3 * H * d,) of the matmul, in qkv's dtype or float32; None for no bias.
        q_weight, k_weight: (d,) RMS-norm weights in qkv's dtype or float32; None for no norm.
        rope: (2, N, d / 2) float32 cosines and sines, as made by `rope_2d`, that rotate the pairs
            (i, i + d / 2); gets no gradient.
        eps: added to the mean square of q and k.

    Returns:
        q and k (B, N, H, d) in qkv's dtype, each rounded once.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    return prepare_qk(qkv, qkv_bias, q_weight, k_weight, rope, num_heads, eps)


def check_qkv(
    op: str,
    qkv: Tensor,
    num_heads: int,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    eps: float,
) -> None:
    """Check the arguments that `op` shares with `qk_norm_rope`."""
    optional = {"qkv_bias": qkv_bias, "q_weight": q_weight, "k_weight": k_weight, "rope": rope}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    checks.tensors(op, qkv=qkv, **given)
    checks.dimensions(op, "qkv", qkv, "(B, N, 3*H*d)")
    tokens, width = qkv.shape[1:]
    if not isinstance(num_heads, (Integral, torch.SymInt)):
        kind = type(num_heads).__name__
        raise TypeError(f"{op}: num_heads must be a whole number, got {kind}")
    if num_heads < 1 or width % (3 * num_heads) or not tokens or not width:
        raise ValueError(
            f"{op}: qkv must be (B, N, 3*H*d) with N, d >= 1 and num_heads = H = {num_heads}, "
            f"got {tuple(qkv.shape)}"
        )
    head_dim = width // (3 * num_heads)
    if rope is not None:
        if head_dim % 2:
            raise ValueError(f"{op}: rope needs an even head_dim, got {head_dim}")
        checks.shape(op, "rope", rope, "(2, N, d/2)", (2, tokens, head_dim // 2))
        checks.dtype(op, "rope", rope, torch.float32)
        checks.constant(op, "rope", rope)
    vectors = {"q_weight": ("(d,)", head_dim), "k_weight": ("(d,)", head_dim)}
    for name, (form, length) in {"qkv_bias": ("(3*H*d,)", width), **vectors}.items():
        if name in given:
            checks.shape(op, name, given[name], form, (length,))
            checks.dtype(op, name, given[name], qkv.dtype, torch.float32)
    checks.number(op, "eps", eps)


def is_prepared(*options: Tensor | None) -> bool:
    """Tell whether there is a bias, a norm weight or a table of angles."""
    return any(option is not None for option in options)


def new_gradients(
    qkv: Tensor, qkv_bias: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None
) -> Gradients:
    """Make tensors for the gradients of qkv, its bias and the norm weights."""
    grad_bias, grad_q_weight, grad_k_weight = (
        new_gradient(parameter, qkv) for parameter in (qkv_bias, q_weight, k_weight)
    )
    return qkv.new_empty(qkv.shape), grad_bias, grad_q_weight, grad_k_weight


def gradients_by_name(grads: Gradients, **parameters: Tensor | None) -> dict[str, Tensor]:
    """Return the gradients of a backward, without those of parameters that are not there."""
    found = zip(parameters.items(), grads[1:], strict=True)
    return {"qkv": grads[0]} | {name: grad for (name, x), grad in found if x is not None}


def _fake(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    q = qkv.new_empty((batch, tokens, num_heads, width // (3 * num_heads)))
    return q, q.new_empty(q.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.num_heads, ctx.eps = inputs
    ctx.shape = output[0].shape
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> dict[str, Tensor]:
    saved = ctx.saved_tensors  # once: under checkpointing it would compute them twice
    qkv, qkv_bias, q_weight, k_weight, _ = saved
    grad_q = qkv.new_zeros(ctx.shape) if grad_q is None else grad_q
    grad_k = qkv.new_zeros(ctx.shape) if grad_k is None else grad_k
    grads = qk_norm_rope_backward(grad_q, grad_k, None, *saved, ctx.num_heads, ctx.eps)
    return gradients_by_name(grads, qkv_bias=qkv_bias, q_weight=q_weight, k_weight=k_weight)


qk_norm_rope_backward = define(
    "qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor? grad_v, Tensor qkv, "
    "Tensor? qkv_bias, Tensor? q_weight, Tensor? k_weight, Tensor? rope, int num_heads, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.qk_norm_rope_backward,
    kernels=("cuda", "triton"),
    fake=new_gradients,
)

prepare_qk = define(
    "qk_norm_rope(Tensor qkv, Tensor? qkv_bias, Tensor? q_weight, Tensor? k_weight, Tensor? rope, "
    "int num_heads, float eps) -> (Tensor, Tensor)",
    reference=reference.qk_norm_rope,
    kernels=("cuda", "triton"),
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
    check=check_qkv,
)
