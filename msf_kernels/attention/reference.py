"""Softmax attention over packed qkv with optional bias, QK-norm and rotary positions.

B, N, H, d are batch, tokens, heads, head_dim. Bias, norm and rotation run in float32 and round q, k
and v once. As in a flash kernel, scores and softmax are float32 and the other matmuls take operands
of the input dtype: 16-bit scores would multiply the error by 30 where logits are large. (float64
for float64 throughout.) `options` are the fields of a `Preparation`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dtypes import widen
from ..qk_norm_rope.preparation import Preparation
from ..qk_norm_rope.reference import biased, gradients, heads, new_gradient, norm_rope


def attention(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T / sqrt(d)) v and the logsumexp of the scaled scores.

    The first is (B, N, H * d) in qkv's dtype, the second (B, H, N) in the compute dtype.
    """
    _, _, q, k, v = _heads(qkv, Preparation(*options))
    scores = _scores(q, k)
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights / total).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2), (total.log() + largest).squeeze(-1)


def attention_backward(
    grad: Tensor, out: Tensor, logsumexp: Tensor, qkv: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of qkv and of the parameters, empty for what is absent.

    `grad` and `out` are (B, N, H * d). With P the probabilities and row sums D = sum(grad * out),
    dS = P * (grad v^T - D) as in FlashAttention (Dao et al., 2022, appendix B).
    """
    given = Preparation(*options)
    raw_q, raw_k, q, k, v = _heads(qkv, given)
    probabilities = _scores(q, k).sub_(logsumexp[..., None]).exp_()

    grad_qkv = new_gradient(qkv)
    grad_v = heads(grad_qkv, given.num_heads)[2]
    grad, out = (x.unflatten(-1, (given.num_heads, -1)).transpose(1, 2) for x in (grad, out))
    grad = grad.contiguous()
    row_sums = (widen(grad) * out).sum(-1, keepdim=True)
    grad_v.copy_(probabilities.to(grad.dtype).mT @ grad)

    grad_scores = (widen(grad) @ widen(v).mT).sub_(row_sums).mul_(probabilities)
    grad_scores = grad_scores.mul_(q.shape[-1] ** -0.5).to(q.dtype)
    grads = grad_scores @ k, grad_scores.mT @ q
    return gradients(grad_qkv, *grads, raw_q, raw_k, qkv.dtype, given)


def _heads(qkv: Tensor, given: Preparation) -> tuple[Tensor, ...]:
    """Return q and k in the compute dtype before norm and rotation; q, k and v, rounded, after."""
    raw_q, raw_k, v = heads(biased(qkv, given.qkv_bias), given.num_heads)
    q = norm_rope(raw_q, given.q_weight, given.q_norm_bias, given).to(qkv.dtype)
    k = norm_rope(raw_k, given.k_weight, given.k_norm_bias, given).to(qkv.dtype)
    return raw_q, raw_k, q, k, v.to(qkv.dtype).contiguous()


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return the scaled scores (B, H, N, N) in the compute dtype, a new tensor."""
    return (widen(q) @ widen(k).mT) * q.shape[-1] ** -0.5
