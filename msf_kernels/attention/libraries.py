"""PyTorch's SDPA kernels and flash-attn as backends of our attention.

Each is asked for by name, so none of PyTorch's own choices takes part. Bias, norm and rotation run
before them as `qk_norm_rope`, whose backward packs the gradients that they return. Their gradients
repeat bit for bit under torch.use_deterministic_algorithms(True), as far as they can.
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
from ..library import by_name
from ..qk_norm_rope.op import Gradients, new_gradients, prepare_qk, qk_norm_rope_backward
from ..qk_norm_rope.preparation import Preparation
from . import flash_attn, reference, sdpa
from .prepared import heads, prepared


@dataclass(frozen=True)
class Library:
    """A library computes attention of q, k and v (B, N, H, d), scaled by 1 / sqrt(d), no mask.

    Args:
        forward: (q, k, v) -> out (B, N, H, d) and the logsumexp of the scaled scores (B, H, N).
        backward: (grad, q, k, v, out, logsumexp) -> the gradients of q, k and v.
        writes_into: whether backward takes `into=`, three tensors to write them to.
        unsupported_device_reason: device -> None or why it does not take tensors of it.
        unsupported_args_reason: (q, k, v) -> None or why it does not take these, or not their
            gradient where they require one. A compiled forward does not tell that one will be
            asked for.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Iterable[Tensor]]
    unsupported_device_reason: Callable[[torch.device], str | None]
    unsupported_args_reason: Callable[..., str | None]
    writes_into: bool = False


def attention(library: Library, qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    if not len(qkv):  # no library takes an empty batch
        with torch.autocast(qkv.device.type, enabled=False):
            return reference.attention(qkv, *options)
    out, logsumexp = library.forward(*prepared(prepare_qk, qkv, Preparation(*options)))
    return out.flatten(2).contiguous(), logsumexp.contiguous()


def attention_backward(
    library: Library, grad: Tensor, out: Tensor, logsumexp: Tensor, qkv: Tensor, *options: Any
) -> Gradients:
    if not len(qkv):
        with torch.autocast(qkv.device.type, enabled=False):
            return reference.attention_backward(grad, out, logsumexp, qkv, *options)
    given = Preparation(*options)
    q_k_v = prepared(prepare_qk, qkv, given)
    grad, out = (aligned(x).unflatten(-1, (given.num_heads, -1)) for x in (grad, out))
    if library.writes_into and given.is_empty:
        packed = new_gradients(qkv, *given.parameters)
        library.backward(grad, *q_k_v, out, logsumexp, into=heads(packed[0], given.num_heads))
        return packed
    gradients = library.backward(grad, *q_k_v, out, logsumexp)
    return qk_norm_rope_backward(*gradients, qkv, *given)


def register() -> None:
    """Offer the libraries as backends of attention and its gradient."""
    for name, library in LIBRARIES.items():
        for run, reason in ((attention, forward_reason), (attention_backward, backward_reason)):
            dispatch.register(run.__name__, name, implementation(library, run, reason))


def implementation(
    library: Library, run: Callable[..., Any], reason: Callable[..., str | None]
) -> dispatch.Implementation:
    """Make the library a backend of the operator that `run` has the name and arguments of."""
    return dispatch.Implementation(
        partial(run, library),
        library.unsupported_device_reason,
        by_name(run.__name__, partial(reason, library)),
    )


def forward_reason(
    library: Library,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_bias: Tensor | None,
    num_heads: int,
) -> str | None:
    """Return why the library cannot take the arguments of attention, None where it can."""
    # Views require no gradient below autograd, so the arguments are asked.
    inputs = qkv, qkv_bias, q_weight, k_weight, q_norm_bias, k_norm_bias
    trained = any(x is not None and x.requires_grad for x in inputs)
    return unsupported_reason(library, qkv, num_heads, trained)


def backward_reason(library: Library, qkv: Tensor, num_heads: int) -> str | None:
    """Return why the library cannot take attention_backward's arguments, None where it can."""
    return unsupported_reason(library, qkv, num_heads, trained=True)


def unsupported_reason(library: Library, qkv: Tensor, num_heads: int, trained: bool) -> str | None:
    """Return why the library cannot take q, k and v, which require a gradient if trained."""
    if not len(qkv):
        return None
    q_k_v = (x.detach().requires_grad_(trained) for x in heads(qkv, num_heads))
    return library.unsupported_args_reason(*q_k_v)


# They are tried in this order where nobody measured. cuDNN was reported 1.7 to 2.3 times as
# fast as flash on H100, and 0.82 times on A100 (huggingface/transformers#48163).
LIBRARIES = {
    "cudnn": Library(
        sdpa.cudnn,
        sdpa.cudnn_backward,
        sdpa.unsupported_device_reason,
        partial(sdpa.unsupported_args_reason, "can_use_cudnn_attention"),
    ),
    "flash": Library(
        sdpa.flash,
        sdpa.flash_backward,
        sdpa.flash_unsupported_device_reason,
        partial(sdpa.unsupported_args_reason, "can_use_flash_attention"),
    ),
    "efficient": Library(
        sdpa.efficient,
        sdpa.efficient_backward,
        sdpa.unsupported_device_reason,
        partial(sdpa.unsupported_args_reason, "can_use_efficient_attention"),
    ),
    "flash-attn": Library(
        flash_attn.forward,
        flash_attn.backward,
        flash_attn.unsupported_device_reason,
        flash_attn.unsupported_args_reason,
        writes_into=True,
    ),
}
