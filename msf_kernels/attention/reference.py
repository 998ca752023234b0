"""Softmax attention over packed qkv with optional bias, QK-norm and rotary positions.

B, N, H, d are batch, tokens, heads, head_dim. Bias, norm and rotation run in float32 and round q, k
and v once. As in a flash kernel, scores and softmax are float32 and the other matmuls take operands
of the input dtype: 16-bit scores would multiply the error by 30 where logits are large. (float64
for float64 throughout.)
"""

from __future__ import annotations

from torch import Tensor

from ..dtypes import widen
from ..qk_norm_rope.reference import (
    bias_gradient,
    biased,
    heads,
    new_gradient,
    norm_rope,
    norm_rope_backward,
)


def attention(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T / sqrt(d)) v and the logsumexp of the scaled scores.

    The first is (B, N, H * d) in qkv's dtype, the second (B, H, N) in the compute dtype.
    """
    _, _, q, k, v = _heads(qkv, qkv_bias, q_weight, k_weight, rope, num_heads, eps)
    scores = _scores(q, k)
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights / total).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2), (total.log() + largest).squeeze(-1)


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of qkv, of its bias and of the norm weights, empty for what is absent.

    `grad` and `out` are (B, N, H * d). With P the probabilities and row sums D = sum(grad * out),
    dS = P * (grad v^T - D) as in FlashAttention (Dao et al., 2022, appendix B).
    """
    options = qkv_bias, q_weight, k_weight, rope, num_heads, eps
    raw_q, raw_k, q, k, v = _heads(qkv, *options)
    probabilities = _scores(q, k).sub_(logsumexp[..., None]).exp_()

    grad_qkv = new_gradient(qkv)
    grad_q, grad_k, grad_v = heads(grad_qkv, num_heads)
    grad = grad.unflatten(-1, (num_heads, -1)).transpose(1, 2).contiguous()
    out = out.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    row_sums = (widen(grad) * out).sum(-1, keepdim=True)
    grad_v.copy_(probabilities.to(grad.dtype).mT @ grad)

    grad_scores = (widen(grad) @ widen(v).mT).sub_(row_sums).mul_(probabilities)
    grad_scores = grad_scores.mul_(q.shape[-1] ** -0.5).to(q.dtype)
    grad_q_weight = norm_rope_backward(grad_q, grad_scores @ k, raw_q, q_weight, rope, eps)
    grad_k_weight = norm_rope_backward(grad_k, grad_scores.mT @ q, raw_k, k_weight, rope, eps)
    grad_bias = bias_gradient(grad_qkv, qkv_bias)
    return grad_qkv.to(qkv.dtype), grad_bias, grad_q_weight, grad_k_weight


def _heads(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Return q and k in the compute dtype before norm and rotation; q, k and v, rounded, after."""
    raw_q, raw_k, v = heads(biased(qkv, qkv_bias), num_heads)
    q = norm_rope(raw_q, q_weight, rope, eps).to(qkv.dtype)
    k = norm_rope(raw_k, k_weight, rope, eps).to(qkv.dtype)
    return raw_q, raw_k, q, k, v.to(qkv.dtype).contiguous()


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return the scaled scores (B, H, N, N) in the compute dtype, a new tensor."""
    return (widen(q) @ widen(k).mT) * q.shape[-1] ** -0.5
