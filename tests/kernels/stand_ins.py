"""A kernel that is none, and functions of libraries for attention that need a GPU, on a CPU.

Those have the signatures of the libraries, compute with PyTorch's flash attention for CPUs, and
assert that they are called as theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from msf_kernels.dispatch import Implementation
from numerics import normal

# The operator that stand-ins are registered for, and a call of it.
GATE = "gate_residual"
ARGS = (normal(2, 3, 5), normal(2, 3, 5), normal(2, 5))


def answering(value: float, **predicates: object) -> Implementation:
    return Implementation(lambda x, *_: torch.full_like(x, value), **predicates)  # type: ignore[arg-type]


flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, bias: None, compute_log_sumexp: bool) -> Any:
    assert bias is None and compute_log_sumexp
    out, logsumexp = flash(q, k, v)
    padded = F.pad(logsumexp, (0, -logsumexp.shape[-1] % 32), value=torch.inf)
    return out, padded, None, None


def efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, logsumexp: Tensor,
    seed: Tensor, offset: Tensor, dropout_p: float, grad_input_mask: list[bool],
) -> Any:  # fmt: skip
    assert bias is None and dropout_p == 0 and grad_input_mask == [True, True, True, False]
    assert logsumexp.shape[-1] % 32 == 0 and logsumexp[..., q.shape[2] :].isposinf().all()
    logsumexp = logsumexp[..., : q.shape[2]]
    return *flash_backward(grad, q, k, v, out, logsumexp, 0.0, False), None


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, bias: None, compute_log_sumexp: bool) -> Any:
    assert bias is None and compute_log_sumexp
    out, logsumexp = flash(q, k, v)
    return out, logsumexp[..., None], None, None, q.shape[2], k.shape[2], None, None, None


def cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, seed: Tensor,
    offset: Tensor, bias: None, cum_seq_q: None, cum_seq_k: None, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool,
) -> Any:  # fmt: skip
    assert (max_q, max_k, dropout_p, is_causal) == (q.shape[2], k.shape[2], 0.0, False)
    assert grad.stride() == out.stride()  # which cuDNN before 9.5.1 wants
    return flash_backward(grad, q, k, v, out, logsumexp.squeeze(-1), 0.0, False)


STAND_INS = {
    "efficient": {
        "_scaled_dot_product_efficient_attention": efficient_forward,
        "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    },
    "cudnn": {
        "_scaled_dot_product_cudnn_attention": cudnn_forward,
        "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    },
}


def swap(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


class FlashAttn2:
    """Signatures of flash_attn 2.8's flash_attn_interface."""

    @staticmethod
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
        assert softcap == 0 and alibi_slopes is None and not return_softmax
        out, logsumexp = flash(*swap(q, k, v), scale=softmax_scale)
        return out.transpose(1, 2), logsumexp, torch.empty(0), torch.empty(2)

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
        assert softcap == 0 and alibi_slopes is None and deterministic
        tensors = *swap(dout, q, k, v, out), softmax_lse
        gradients = flash_backward(*tensors, 0.0, False, scale=softmax_scale)
        for into, gradient in zip((dq, dk, dv), swap(*gradients), strict=True):
            into.copy_(gradient)


class FlashAttn3:
    """What is used of the signatures of flash_attn_3's flash_attn_interface."""

    @staticmethod
    def _flash_attn_forward(q, k, v, k_new=None, v_new=None, *, softmax_scale=None, causal=False):
        out, logsumexp = flash(*swap(q, k, v), scale=softmax_scale)
        return out.transpose(1, 2), logsumexp, torch.empty(0), torch.empty(0)

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
        sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
        deterministic=False, sm_margin=0,
    ):  # fmt: skip
        whole = 0.0, False, -1, -1, 0.0, None, deterministic
        FlashAttn2._flash_attn_backward(
            *(dout, q, k, v, out, softmax_lse, dq, dk, dv, whole[0], softmax_scale, *whole[1:])
        )
