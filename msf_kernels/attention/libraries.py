"""Attention of other libraries as backends of ours: PyTorch's SDPA kernels and flash-attn.

Each is asked for by name, so none of PyTorch's own choices takes part. Norm and rotation run before
them as `qk_norm_rope`, whose backward packs the gradients that they return. Their gradients repeat
bit for bit under torch.use_deterministic_algorithms(True), as far as they can.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.backends.cuda
from torch import Tensor
from torch.nn import functional as F

from .. import backend
from ..qk_norm_rope.op import prepare_qk, qk_norm_rope_backward
from . import reference

aten: Any = torch.ops.aten
cuda: Any = torch.backends.cuda


@dataclass(frozen=True)
class Library:
    """Attention of q, k and v (B, N, H, d) without mask and dropout, scaled by 1 / sqrt(d).

    Args:
        forward: (q, k, v) -> out (B, N, H, d) and the logsumexp of the scaled scores (B, H, N).
        backward: (grad, q, k, v, out, logsumexp) -> the gradients of q, k and v.
        available: device -> None where it takes tensors of it, else the reason.
        can_run: (q, k, v) -> None where it takes these, else the reason.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Iterable[Tensor]]
    available: Callable[[torch.device], str | None]
    can_run: Callable[..., str | None]


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
        return reference.attention_backward(
            grad, qkv, q_weight, k_weight, rope, out, logsumexp, num_heads, eps
        )
    heads = _prepared(qkv, *options)
    grad, out = (x.contiguous().unflatten(-1, (num_heads, -1)) for x in (grad, out))
    gradients = library.backward(grad, *heads, out, logsumexp)
    return qk_norm_rope_backward(*gradients, qkv, *options)


def register() -> None:
    """Offer the libraries as backends of attention and its gradient."""
    for name, library in LIBRARIES.items():
        for op, run, qkv in (
            ("attention", attention, 0),
            ("attention_backward", attention_backward, 1),
        ):
            can_run = partial(_can_run, library, qkv)
            implementation = backend.Implementation(
                partial(run, library), library.available, can_run
            )
            backend.register(op, name, implementation)


def _can_run(library: Library, position: int, *args: Any) -> str | None:
    """Of the operator's arguments, among which qkv has this position."""
    qkv, num_heads = args[position], args[-2]
    return library.can_run(*_heads(qkv, num_heads)) if len(qkv) else None


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()  # which all of them want
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)


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


def _swap(*tensors: Tensor) -> list[Tensor]:
    """Between (B, N, H, d), as we have it, and (B, H, N, d), as PyTorch wants it."""
    return [x.transpose(1, 2) for x in tensors]


def _no_dropout(q: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Stands for the seed and offset of a generator that nobody asks."""
    return torch.empty(2, dtype=dtype, device=q.device)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(*_swap(q, k, v), None, True)
    return out.transpose(1, 2), logsumexp.reshape(logsumexp.shape[:3])


def _cudnn_backward(grad: Tensor, *saved: Tensor) -> Iterable[Tensor]:
    *heads, out, logsumexp = saved
    if torch.__version__ >= "2.9":  # since which it has a last dimension of 1
        logsumexp = logsumexp[..., None]
    tokens, seed = grad.shape[1], _no_dropout(grad)
    return _swap(
        *aten._scaled_dot_product_cudnn_attention_backward(
            *(*_swap(grad, *heads, out), logsumexp, seed, seed, None, None, None),
            *(tokens, tokens, 0.0, False),
        )
    )


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.is_cpu:
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(*_swap(q, k, v))
    else:
        out, logsumexp, *_ = aten._scaled_dot_product_flash_attention(*_swap(q, k, v))
    return out.transpose(1, 2), logsumexp


def _flash_backward(grad: Tensor, *saved: Tensor) -> Iterable[Tensor]:
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


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(*_swap(q, k, v), None, True)
    return out.transpose(1, 2), logsumexp[..., : q.shape[1]]


def _efficient_backward(grad: Tensor, *saved: Tensor) -> Iterable[Tensor]:
    *heads, out, logsumexp = saved
    # As its forward leaves it: a multiple of 32 rows, the additional ones of no weight.
    logsumexp = F.pad(logsumexp, (0, -logsumexp.shape[-1] % 32), value=torch.inf)
    seed = _no_dropout(grad)
    *gradients, _ = aten._scaled_dot_product_efficient_attention_backward(
        *(*_swap(grad, *heads), None, out.transpose(1, 2), logsumexp, seed, seed, 0.0),
        [True, True, True, False],
    )
    return _swap(*gradients)


def _cuda_only(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it takes no tensors on {device}"


def _flash_available(device: torch.device) -> str | None:
    if device.type == "cuda" and not cuda.is_flash_attention_available():
        return "this PyTorch was built without it"
    return None


def _sdpa_can_run(question: str, *heads: Tensor) -> str | None:
    """PyTorch's own answer to can_use_..._attention, and its reason."""
    if heads[0].is_cpu:
        return None
    ask = getattr(cuda, question)
    params = cuda.SDPAParams(*_swap(*heads), None, 0.0, False, False)
    if ask(params):
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ask(params, debug=True)
    reasons = (str(warning.message).partition(" (Triggered internally")[0] for warning in said)
    return " ".join(reasons) or f"PyTorch's {question} says no"


@functools.cache
def _flash_attn() -> tuple[int, Any]:
    """flash-attn's generation and its module of kernels: the newest that is installed.

    Raises:
        ImportError: there is none; the message says why.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        try:
            return 3, importlib.import_module("flash_attn_interface")
        except ImportError:
            pass
    try:
        found = version("flash-attn")
    except PackageNotFoundError:
        raise ImportError("flash-attn is not installed") from None
    if tuple(map(int, found.split(".")[:2])) < (2, 7):
        raise ImportError(f"flash-attn must be 2.7 or later, got {found}")
    return 2, importlib.import_module("flash_attn.flash_attn_interface")


def _flash_attn_available(device: torch.device) -> str | None:
    try:
        _flash_attn()
    except ImportError as error:
        return str(error)
    if reason := _cuda_only(device):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"this GPU is sm_{major}{minor}, flash-attn needs sm_80 or later"


def _flash_attn_can_run(q: Tensor, *_: Tensor) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16 and float16, got {str(q.dtype).removeprefix('torch.')}"
    head_dim = q.shape[-1]
    if head_dim % 8 or head_dim > 256:
        return f"flash-attn takes a head_dim of 8, 16 ... 256, got {head_dim}"
    return None


# What generation 2 wants besides; generation 3 has it as defaults.
_WHOLE: dict[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def _flash_attn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    generation, module = _flash_attn()
    options = {**_WHOLE, "return_softmax": False} if generation == 2 else {}
    # Generation 2 declares that it writes q, k and v, which would count as a change of qkv.
    heads = (x.data for x in (q, k, v))
    out, logsumexp, *_ = module._flash_attn_forward(
        *heads, softmax_scale=q.shape[-1] ** -0.5, **options
    )
    return out, logsumexp


def _flash_attn_backward(grad: Tensor, *saved: Tensor) -> Iterable[Tensor]:
    q, k, v, *_ = saved
    generation, module = _flash_attn()
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    module._flash_attn_backward(
        grad,
        *saved,
        **dict(zip(("dq", "dk", "dv"), gradients)),
        softmax_scale=q.shape[-1] ** -0.5,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **(_WHOLE if generation == 2 else {}),
    )
    return gradients


LIBRARIES = {
    "cudnn": Library(
        _cudnn, _cudnn_backward, _cuda_only, partial(_sdpa_can_run, "can_use_cudnn_attention")
    ),
    "flash": Library(
        _flash, _flash_backward, _flash_available, partial(_sdpa_can_run, "can_use_flash_attention")
    ),
    "efficient": Library(
        _efficient,
        _efficient_backward,
        _cuda_only,
        partial(_sdpa_can_run, "can_use_efficient_attention"),
    ),
    "flash-attn": Library(
        _flash_attn_forward, _flash_attn_backward, _flash_attn_available, _flash_attn_can_run
    ),
}
