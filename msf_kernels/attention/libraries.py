"""Attention of other libraries as backends of ours: PyTorch's SDPA kernels and flash-attn.

Each is asked for by name, so none of PyTorch's own choices takes part. Norm and rotation run before
them as `qk_norm_rope`, whose backward packs the gradients that they return. Their gradients repeat
bit for bit under torch.use_deterministic_algorithms(True), as far as they can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..layout import aligned
from ..qk_norm_rope.op import prepare_qk, qk_norm_rope_backward, weight_gradient
from . import flash_attn, reference, sdpa


@dataclass(frozen=True)
class Library:
    """Attention of q, k and v (B, N, H, d) without mask and dropout, scaled by 1 / sqrt(d).

    Args:
        forward: (q, k, v) -> out (B, N, H, d) and the logsumexp of the scaled scores (B, H, N).
        backward: (grad, q, k, v, out, logsumexp) -> the gradients of q, k and v.
        writes_into: whether backward takes `into=`, three tensors to write them to.
        available: device -> None where it takes tensors of it, else the reason.
        can_run: (q, k, v) -> None where it takes these, and their gradient where they require
            one, else the reason. A compiled forward does not tell that one will be asked for.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Iterable[Tensor]]
    available: Callable[[torch.device], str | None]
    can_run: Callable[..., str | None]
    writes_into: bool = False


def attention(
    library: Library,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if not len(qkv):  # which no library takes
        with torch.autocast(qkv.device.type, enabled=False):
            return reference.attention(qkv, q_weight, k_weight, rope, num_heads, eps)
    heads = _prepared(qkv, q_weight, k_weight, rope, num_heads, eps)
    out, logsumexp = library.forward(*heads)
    return out.flatten(2).contiguous(), logsumexp.contiguous()


def attention_backward(
    library: Library,
    grad: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = q_weight, k_weight, rope, num_heads, eps
    if not len(qkv):
        with torch.autocast(qkv.device.type, enabled=False):
            return reference.attention_backward(
                grad, qkv, q_weight, k_weight, rope, out, logsumexp, num_heads, eps
            )
    heads = _prepared(qkv, *options)
    grad, out = (aligned(x).unflatten(-1, (num_heads, -1)) for x in (grad, out))
    if library.writes_into and all(option is None for option in options[:3]):
        grad_qkv = qkv.new_empty(qkv.shape)
        library.backward(grad, *heads, out, logsumexp, into=_heads(grad_qkv, num_heads))
        return grad_qkv, weight_gradient(None, qkv), weight_gradient(None, qkv)
    gradients = library.backward(grad, *heads, out, logsumexp)
    return qk_norm_rope_backward(*gradients, qkv, *options)


def register() -> None:
    """Offer the libraries as backends of attention and its gradient."""
    for name, library in LIBRARIES.items():
        can_run = partial(_can_run, library)
        for run in (attention, attention_backward):
            implementation = dispatch.Implementation(
                partial(run, library), library.available, can_run
            )
            dispatch.register(run.__name__, name, implementation)


def _can_run(library: Library, *args: Any) -> str | None:
    """Of the arguments of attention or its gradient, whose qkv comes first or second."""
    is_forward = len(args) == 6
    qkv, num_heads = args[0 if is_forward else 1], args[-2]
    if not len(qkv):
        return None
    # Asked of the arguments: below autograd views require no gradient.
    trained = any(x.requires_grad for x in args if isinstance(x, Tensor)) or not is_forward
    heads = (x.detach().requires_grad_(trained) for x in _heads(qkv, num_heads))
    return library.can_run(*heads)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    return aligned(qkv).unflatten(-1, (3, num_heads, -1)).unbind(2)


def _prepared(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    q, k, v = _heads(qkv, num_heads)
    if q_weight is not None or k_weight is not None or rope is not None:
        q, k = prepare_qk(qkv, q_weight, k_weight, rope, num_heads, eps)
    return q, k, v


# In the order in which they are tried where nobody measured. cuDNN was reported 1.7 to 2.3 times as
# fast as flash on H100, and 0.82 times on A100 (huggingface/transformers#48163).
LIBRARIES = {
    "cudnn": Library(
        sdpa.cudnn,
        sdpa.cudnn_backward,
        sdpa.cuda_only,
        partial(sdpa.can_run, "can_use_cudnn_attention"),
    ),
    "flash": Library(
        sdpa.flash,
        sdpa.flash_backward,
        sdpa.flash_available,
        partial(sdpa.can_run, "can_use_flash_attention"),
    ),
    "efficient": Library(
        sdpa.efficient,
        sdpa.efficient_backward,
        sdpa.cuda_only,
        partial(sdpa.can_run, "can_use_efficient_attention"),
    ),
    "flash-attn": Library(
        flash_attn.forward,
        flash_attn.backward,
        flash_attn.available,
        flash_attn.can_run,
        writes_into=True,
    ),
}
