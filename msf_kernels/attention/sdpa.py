"""Calls of the kernels behind PyTorch's scaled_dot_product_attention, each by its own operator.

The functions here make up `Library` objects (libraries.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.backends.cuda
from torch import Tensor
from torch.nn import functional as F

aten: Any = torch.ops.aten
cuda: Any = torch.backends.cuda


def _swap(*tensors: Tensor) -> list[Tensor]:
    """Swap tokens and heads: (B, N, H, d) is our layout, (B, H, N, d) is PyTorch's."""
    return [x.transpose(1, 2) for x in tensors]


def _no_dropout(q: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Make a stand-in for the seed and the offset of a generator that nobody asks."""
    return torch.empty(2, dtype=dtype, device=q.device)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(*_swap(q, k, v), None, True)
    return out.transpose(1, 2), logsumexp.reshape(logsumexp.shape[:3])


def cudnn_backward(grad: Tensor, *saved: Tensor) -> Iterable[Tensor]:
    *heads, out, logsumexp = saved
    if torch.__version__ >= "2.9":  # since then it has a last dimension of 1
        logsumexp = logsumexp[..., None]
    tokens, seed = grad.shape[1], _no_dropout(grad)
    return _swap(
        *aten._scaled_dot_product_cudnn_attention_backward(
            *(*_swap(grad, *heads, out), logsumexp, seed, seed, None, None, None),
            *(tokens, tokens, 0.0, False),
        )
    )


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.is_cpu:
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(*_swap(q, k, v))
    else:
        out, logsumexp, *_ = aten._scaled_dot_product_flash_attention(*_swap(q, k, v))
    return out.transpose(1, 2), logsumexp


def flash_backward(grad: Tensor, *saved: Tensor) -> Iterable[Tensor]:
    *heads, out, logsumexp = saved
    tensors = *_swap(grad, *heads, out), logsumexp
    if grad.is_cpu:
        return _swap(
            *aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, False)
        )
    tokens, seed = grad.shape[1], _no_dropout(grad, torch.uint64)
    return _swap(
        *aten._scaled_dot_product_flash_attention_backward(
            *tensors, None, None, tokens, tokens, 0.0, False, seed, seed
        )
    )


def efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(*_swap(q, k, v), None, True)
    return out.transpose(1, 2), logsumexp[..., : q.shape[1]]


def efficient_backward(grad: Tensor, *saved: Tensor) -> Iterable[Tensor]:
    *heads, out, logsumexp = saved
    # Its forward leaves a multiple of 32 rows, of which the additional ones have no weight.
    logsumexp = F.pad(logsumexp, (0, -logsumexp.shape[-1] % 32), value=torch.inf)
    seed = _no_dropout(grad)
    *gradients, _ = aten._scaled_dot_product_efficient_attention_backward(
        *(*_swap(grad, *heads), None, out.transpose(1, 2), logsumexp, seed, seed, 0.0),
        [True, True, True, False],
    )
    return _swap(*gradients)


def unsupported_device_reason(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it takes no tensors on {device}"


def flash_unsupported_device_reason(device: torch.device) -> str | None:
    if device.type == "cuda" and not cuda.is_flash_attention_available():
        return "this PyTorch was built without it"
    return None


def unsupported_args_reason(question: str, *heads: Tensor) -> str | None:
    """Return why PyTorch's can_use_..._attention named by `question` says no; None for yes."""
    head_dim = heads[0].shape[-1]
    if heads[0].is_cpu:
        return None
    if head_dim % 8:  # PyTorch pads the others before they come here
        return f"it takes a head_dim of 8, 16 ..., got {head_dim}"
    ask = getattr(cuda, question)
    params = cuda.SDPAParams(*_swap(*heads), None, 0.0, False, False)
    with torch.enable_grad():  # else it would not ask for the gradient's limits
        if ask(params):
            return None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ask(params, debug=True)
    reasons = (str(warning.message).partition(" (Triggered internally")[0] for warning in said)
    return " ".join(reasons) or f"PyTorch's {question} says no"
