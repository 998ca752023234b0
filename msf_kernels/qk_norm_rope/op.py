"""qk_norm_rope as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..layout import new_gradient
from ..library import define
from . import reference
from .preparation import NORMS, PARAMETERS

# The gradients of qkv, then of the parameters in their order.
Gradients = tuple[Tensor, ...]


def qk_norm_rope(
    qkv: Tensor,
    *,
    num_heads: int,
    qkv_bias: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    rope: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms",
) -> tuple[Tensor, Tensor]:
    """Return q and k as `attention` prepares them, for another library's attention.

    q and k of packed qkv get their part of `qkv_bias`, then pass a per-head norm (QK-norm: Henry et
    al., 2020; Dehghani et al., 2023), then a rotation by `rope` (RoPE: Su et al., 2021); each is
    optional. v is `qkv.unflatten(-1, (3, num_heads, -1))[:, :, 2]`, without a copy and
    before its part of the bias.

    Args:
        qkv: (B, N, 3 * H * d) float64, float32, bfloat16 or float16, laid out [q | k | v].
        num_heads: H.
        qkv_bias: (3 * H * d,) of the matmul, in qkv's dtype or float32; None for no bias.
        q_weight, k_weight: (d,) norm weights in qkv's dtype or float32; None for no norm.
        q_norm_bias, k_norm_bias: (d,) of LayerNorm, beside its weight and in such a dtype; None for
            no bias.
        rope: (2, N, d / 2) float32 cosines and sines, as made by `rope_2d`, that rotate the pairs
            (i, i + d / 2); gets no gradient.
        eps: added to the mean square of q and k, or their variance.
        norm: "rms" for RMS norm (Zhang & Sennrich, 2019), or "layer" for LayerNorm, which subtracts
            a head's mean first.

    Returns:
        q and k (B, N, H, d) in qkv's dtype, each rounded once.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    return prepare_qk(
        qkv, qkv_bias, q_weight, k_weight, q_norm_bias, k_norm_bias, rope, num_heads, eps, norm
    )


def check_qkv(
    op: str,
    qkv: Tensor,
    num_heads: int,
    rope: Tensor | None,
    eps: float,
    norm: str,
    **parameters: Tensor | None,
) -> None:
    """Check the arguments that `op` shares with `qk_norm_rope`; `parameters` are PARAMETERS."""
    given = {name: x for name, x in {**parameters, "rope": rope}.items() if x is not None}
    checks.tensors(op, qkv=qkv, **given)
    checks.dimensions(op, "qkv", qkv, "(B, N, 3*H*d)")
    tokens, width = qkv.shape[1:]
    checks.whole_number(op, "num_heads", num_heads)
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
    for name in PARAMETERS:
        if name in given:
            form, length = ("(3*H*d,)", width) if name == "qkv_bias" else ("(d,)", head_dim)
            checks.shape(op, name, given[name], form, (length,))
            checks.dtype(op, name, given[name], qkv.dtype, torch.float32)
    checks.eps(op, eps)
    checks.choice(op, "norm", norm, NORMS)
    for x in "qk":
        if f"{x}_norm_bias" in given and (norm != "layer" or f"{x}_weight" not in given):
            raise ValueError(f'{op}: {x}_norm_bias goes with {x}_weight and norm="layer"')


def new_gradients(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_bias: Tensor | None,
) -> Gradients:
    """Make tensors for the gradients of qkv and the parameters."""
    parameters = qkv_bias, q_weight, k_weight, q_norm_bias, k_norm_bias
    return qkv.new_empty(qkv.shape), *(new_gradient(x, qkv) for x in parameters)


def gradients_by_name(grads: Gradients, inputs: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Return the gradients of qkv and the parameters, of which `inputs` begins with all, by name.

    Those of parameters that are not there are left out.
    """
    found = zip(("qkv", *PARAMETERS), inputs, grads)
    return {name: grad for name, x, grad in found if x is not None}


def _fake(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    q = qkv.new_empty((batch, tokens, num_heads, width // (3 * num_heads)))
    return q, q.new_empty(q.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.num_heads, ctx.eps, ctx.norm = inputs
    ctx.shape = output[0].shape
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> dict[str, Tensor]:
    saved = ctx.saved_tensors  # once: under checkpointing it would compute them twice
    qkv = saved[0]
    grad_q = qkv.new_zeros(ctx.shape) if grad_q is None else grad_q
    grad_k = qkv.new_zeros(ctx.shape) if grad_k is None else grad_k
    grads = qk_norm_rope_backward(grad_q, grad_k, None, *saved, ctx.num_heads, ctx.eps, ctx.norm)
    return gradients_by_name(grads, saved)


# Of every operator on packed qkv: the fields of a Preparation.
PREPARATION_SCHEMA = (
    "Tensor? qkv_bias, Tensor? q_weight, Tensor? k_weight, Tensor? q_norm_bias, "
    "Tensor? k_norm_bias, Tensor? rope, int num_heads, float eps, str norm"
)
GRADIENTS_SCHEMA = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

qk_norm_rope_backward = define(
    "qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor? grad_v, Tensor qkv, "
    f"{PREPARATION_SCHEMA}) -> {GRADIENTS_SCHEMA}",
    reference=reference.qk_norm_rope_backward,
    kernels=("cuda", "triton"),
    fake=new_gradients,
)

prepare_qk = define(
    f"qk_norm_rope(Tensor qkv, {PREPARATION_SCHEMA}) -> (Tensor, Tensor)",
    reference=reference.qk_norm_rope,
    kernels=("cuda", "triton"),
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
    check=check_qkv,
)
