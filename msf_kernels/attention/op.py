"""attention as an operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dtypes import compute_dtype
from ..library import define
from ..qk_norm_rope.op import (
    GRADIENTS_SCHEMA,
    PREPARATION_SCHEMA,
    check_qkv,
    gradients_by_name,
    new_gradients,
)
from . import libraries, reference


def attention(
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
) -> Tensor:
    """Compute self-attention from what the qkv matmul gives to what the output projection takes.

    It is softmax(q k^T / sqrt(d)) v a head, without mask. q, k and v optionally get a bias; q and k
    then optionally pass a per-head norm (QK-norm: Henry et al., 2020; Dehghani et al., 2023) and a
    rotation by `rope`. As in FlashAttention (Dao et al., 2022) the gradient's probabilities
    come from a float32 logsumexp, so that logits of 1e4 cost it three digits.

    Args:
        qkv: (B, N, 3 * H * d) float64, float32, bfloat16 or float16, laid out [q | k | v].
        num_heads: H.
        qkv_bias: (3 * H * d,) of the qkv matmul, in qkv's dtype or float32; None for no bias. With
            its gradient summed here, it costs no pass over qkv of its own.
        q_weight, k_weight: (d,) norm weights in qkv's dtype or float32; None for no norm.
        q_norm_bias, k_norm_bias: (d,) of LayerNorm, beside its weight and in such a dtype; None for
            no bias.
        rope: (2, N, d / 2) float32 cosines and sines, as made by `rope_2d`, that rotate the pairs
            (i, i + d / 2); gets no gradient.
        eps: added to the mean square of q and k, or their variance.
        norm: "rms" for RMS norm (Zhang & Sennrich, 2019), or "layer" for LayerNorm, which subtracts
            a head's mean first.

    Returns:
        (B, N, H * d) in qkv's dtype.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    return _attention(
        qkv, qkv_bias, q_weight, k_weight, q_norm_bias, k_norm_bias, rope, num_heads, eps, norm
    )[0]


def _attention_fake(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    out = qkv.new_empty((batch, tokens, width // 3))
    return out, qkv.new_empty((batch, num_heads, tokens), dtype=compute_dtype(qkv))


def _sizes(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
) -> tuple[int, int, int]:
    """Return tokens, head dim, and whether bias, norm or rotation come before the attention."""
    prepared = any(x is not None for x in (qkv_bias, q_weight, k_weight, rope))
    return qkv.shape[1], qkv.shape[2] // (3 * num_heads), int(prepared)


def _attention_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.num_heads, ctx.eps, ctx.norm = inputs
    out, logsumexp = output
    ctx.save_for_backward(out, logsumexp, *tensors)
    ctx.mark_non_differentiable(logsumexp)


def _attention_gradient(ctx: Any, grad: Tensor, _: None) -> dict[str, Tensor]:
    saved = ctx.saved_tensors  # once: under checkpointing it would compute them twice
    grads = _attention_backward(grad, *saved, ctx.num_heads, ctx.eps, ctx.norm)
    return gradients_by_name(grads, saved[2:])


_attention_backward = define(
    "attention_backward(Tensor grad, Tensor out, Tensor logsumexp, Tensor qkv, "
    f"{PREPARATION_SCHEMA}) -> {GRADIENTS_SCHEMA}",
    reference=reference.attention_backward,
    kernels=("cuda", "triton"),
    fake=new_gradients,
    sizes=_sizes,
)

_attention = define(
    f"attention(Tensor qkv, {PREPARATION_SCHEMA}) -> (Tensor, Tensor)",
    reference=reference.attention,
    kernels=("cuda", "triton"),
    fake=_attention_fake,
    setup_context=_attention_setup,
    backward=_attention_gradient,
    for_gradient=True,
    sizes=_sizes,
    check=check_qkv,
)

libraries.register()
